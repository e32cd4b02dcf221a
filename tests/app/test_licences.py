"""A yes to a licence is asked for where one is needed, kept with what, which and when, and asked for no more."""

import json
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest

from app import licences
from app.errors import AppError
from pipeline.downloads import PARTS, WAN_TEXT, WAN_TINY
from pipeline.models import FAMILIES, family

LONGLIVE = family("longlive")


def refusal(file: Path, *rows: object) -> AppError:
    with pytest.raises(AppError) as refused:
        licences.require(file, rows)  # type: ignore[arg-type]
    assert refused.value.code == "licence_not_accepted"
    assert "\n" not in refused.value.message
    return refused.value


def test_a_yes_is_kept_with_what_which_licence_and_when(tmp_path: Path) -> None:
    file = tmp_path / "beside" / "licences.json"
    refusal(file, LONGLIVE)
    assert not file.exists()
    licences.accept(file, [LONGLIVE, WAN_TEXT])
    licences.require(file, [LONGLIVE, WAN_TEXT])
    kept = json.loads(file.read_text())
    assert list(kept) == ["longlive"], "what wants no yes is not written down"
    assert kept["longlive"]["licence"] == "CC-BY-NC-SA-4.0"
    assert datetime.fromisoformat(kept["longlive"]["when"]).tzinfo is not None
    licences.accept(file, [WAN_TINY, replace(LONGLIVE, title="Another title")])
    assert json.loads(file.read_text())["longlive"] == kept["longlive"], "the first yes stays as it was"
    licences.require(file, [LONGLIVE, WAN_TINY])
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_yes_is_for_one_licence_and_one_download(tmp_path: Path) -> None:
    file = tmp_path / "licences.json"
    licences.accept(file, [LONGLIVE])
    refusal(file, replace(LONGLIVE, licence="CC-BY-NC-ND-4.0"))
    refusal(file, family("krea-realtime"))


def test_a_refusal_names_all_that_want_a_yes_where_to_read_and_the_flag(tmp_path: Path) -> None:
    error = refusal(tmp_path / "licences.json", LONGLIVE, WAN_TEXT, WAN_TINY)
    for part in (LONGLIVE.title, "CC-BY-NC-SA-4.0: not for commercial use", WAN_TINY.title, "read it first"):
        assert part in error.message
    assert WAN_TEXT.title not in error.message
    assert f"https://huggingface.co/{LONGLIVE.repo}, https://huggingface.co/{WAN_TINY.repo}" in error.remedy
    assert "--accept-licence" in error.remedy


@pytest.mark.parametrize("row", [*FAMILIES, *PARTS], ids=lambda row: row.name)
def test_whatever_is_not_known_to_allow_all_use_wants_a_yes(row: licences.Download, tmp_path: Path) -> None:
    free = row.name in {"pocket", "self-forcing", "wan-text", "wan-vae"}
    assert row.needs_consent is not free
    assert (licences.terms(row) == row.licence) is free


@pytest.mark.parametrize("content", ["{", "[]", '{"longlive": "yes"}', '{"longlive": {}}', b"\xff"])
def test_a_file_that_cannot_be_read_holds_no_yes_and_takes_a_new_one(content: str | bytes, tmp_path: Path) -> None:
    file = tmp_path / "licences.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    refusal(file, LONGLIVE)
    licences.accept(file, [LONGLIVE])
    licences.require(file, [LONGLIVE])


def test_a_yes_that_cannot_be_kept_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(AppError) as refused:
        licences.accept(tmp_path / "file" / "licences.json", [LONGLIVE])
    assert refused.value.code == "out_unwritable"
