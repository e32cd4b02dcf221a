import pytest

from tests.e2e import chromium

pytestmark = pytest.mark.e2e


def test_a_named_chromium_that_is_not_there_is_said_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(chromium.VARIABLE, "/nowhere/chromium")
    chromium.find.cache_clear()
    assert chromium.main() == 1
    said = capsys.readouterr().err
    assert "/nowhere/chromium" in said
    assert chromium.ADVICE in said


def test_a_program_that_renders_nothing_is_not_taken_for_a_browser(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(chromium.VARIABLE, "/bin/true")
    chromium.find.cache_clear()
    with pytest.raises(chromium.NoChromiumError, match="/bin/true does not start"):
        chromium.find()
