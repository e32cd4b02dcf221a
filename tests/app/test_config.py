"""The settings of a server."""

import pytest
from pydantic import ValidationError

from app.config import Settings


def test_the_defaults_serve_this_machine_alone() -> None:
    settings = Settings()

    assert settings.host == "127.0.0.1"
    assert settings.workers == 1
    assert settings.chosen_threads >= 1


def test_ice_servers_are_named_with_commas_between(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLSTREAM_ICE_SERVERS", "stun:one.example:3478, stun:two.example")

    assert Settings().ice_servers == ("stun:one.example:3478", "stun:two.example")


@pytest.mark.parametrize("wrong", [{"port": -1}, {"workers": 0}, {"threads": 0}, {"silent_s": 0}, {"colour": "red"}])
def test_a_wrong_setting_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Settings(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("url", ["stun:", "stun:host:abc", "turn:two.example", "http://one.example", "stun:a b"])
def test_an_ice_server_that_no_browser_could_use_is_refused_at_start(url: str) -> None:
    with pytest.raises(ValidationError, match="looks like stun:host"):
        Settings(ice_servers=(url,))
