"""Models are fetched whole or not at all, checked by their hashes, converted, and taken away without harm to others."""

import errno
import io
import logging
import os
import random
import shutil
import signal
import sys
import threading
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from os import strerror
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save

from app import licences
from app import shelf as shelves
from app.errors import AppError
from app.shelf import Shelf
from pipeline.bases import BASES
from pipeline.config import StudentConfig
from pipeline.errors import PipelineError
from pipeline.family import Family
from pipeline.memory import Room
from pipeline.models import family
from pipeline.student import Student
from tests.app.hub import COMMIT, cached, serving
from tests.limits import no_file_larger_than

ROW = family("self-forcing")
BYTES = random.Random(3).randbytes(30_000)
REPO = {"checkpoints/self_forcing_dmd.pt": BYTES, "checkpoints/ode_init.pt": BYTES[:5000], "README.md": b"A card."}

HUB = {ROW.repo or "": REPO}


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path / "hub", tmp_path / "models")


def refusal(run: Callable[[], object], code: str) -> AppError | PipelineError:
    with pytest.raises((AppError, PipelineError)) as refused:
        run()
    assert refused.value.code == code, refused.value.message
    assert "\n" not in refused.value.message
    assert refused.value.remedy
    return refused.value


def leftovers(shelf: Shelf) -> list[Path]:
    return [path for path in shelf.hub.rglob("*") if path.suffix == ".incomplete"]


def test_a_pull_fetches_what_the_row_names_and_nothing_else(shelf: Shelf) -> None:
    assert not shelf.is_pulled(ROW)
    with serving(HUB) as endpoint:
        paths = shelves.pull(shelf, ROW, endpoint=endpoint)
    assert [path.read_bytes() for path in paths] == [BYTES]
    assert shelf.is_pulled(ROW)
    assert shelves.pull(shelf, ROW, offline=True) == paths
    assert list(shelf.pulled(ROW)) == ["checkpoints/self_forcing_dmd.pt"]
    assert leftovers(shelf) == []


def test_a_pull_shows_on_a_terminal_how_far_each_file_is(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", terminal)
    with serving(HUB) as endpoint:
        shelves.pull(shelf, ROW, endpoint=endpoint)
    assert "self_forcing_dmd.pt: 100%" in terminal.getvalue()


def test_a_connection_that_breaks_off_goes_on_behind_the_last_whole_piece_and_the_hubs_own_lines_stay_away(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 4096)  # 10 MiB
    asked: list[tuple[str, str]] = []
    with heard("huggingface_hub") as lines, serving(HUB, breaks_off=True, asked=asked) as endpoint:
        (path,) = shelves.pull(shelf, ROW, endpoint=endpoint)
    assert path.read_bytes() == BYTES
    assert len(BYTES) // 2 // 4096 == 3
    assert asked == [(ROW.files[0], ""), (ROW.files[0], f"bytes={3 * 4096}-")]
    assert lines == []


@contextmanager
def heard(library: str) -> Iterator[list[str]]:
    """What a library says at its own loudness."""
    lines: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger(library).addHandler(listener)
    try:
        yield lines
    finally:
        logging.getLogger(library).removeHandler(listener)


def test_a_second_pull_fetches_what_was_not_finished_from_its_start_and_whole_files_not_again(shelf: Shelf) -> None:
    row, asked = family("longlive"), list[tuple[str, str]]()
    small, large = {"models/lora.pt": BYTES[:9000]}, {"models/longlive_base.pt": BYTES}
    licences.accept(shelf.licences, [row])
    with serving({row.repo or "": small | large}, asked=asked) as endpoint:
        with no_file_larger_than(20_000):
            refusal(lambda: shelves.pull(shelf, row, endpoint=endpoint), "disk_full")
        assert list(shelf.pulled(row)) == list(small)
        asked.clear()
        assert len(shelves.pull(shelf, row, endpoint=endpoint)) == 2
        assert asked == [("models/longlive_base.pt", "")]
        asked.clear()
        assert len(shelves.pull(shelf, row, endpoint=endpoint)) == 2
        assert asked == []


@pytest.fixture
def stopped(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> int:
    """A pull that Ctrl-C stopped in the middle of the file; how many bytes of it were kept."""
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 4096)  # 10 MiB
    gone = threading.Event()

    def interrupt() -> None:
        # Once what was sent is no longer on its way; the last piece may be in the file's buffer.
        while sum(path.stat().st_size for path in leftovers(shelf)) < 8192 and not gone.wait(0.01):
            pass
        os.kill(os.getpid(), signal.SIGINT)
        gone.wait(10)  # whoever waits for the file gets all of it then

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background ignores it
    try:
        with serving(HUB, halfway=interrupt) as endpoint:
            with pytest.raises(KeyboardInterrupt):
                shelves.pull(shelf, ROW, endpoint=endpoint)
            gone.set()
    finally:
        signal.signal(signal.SIGINT, before)
    assert not shelf.is_pulled(ROW)
    (part,) = leftovers(shelf)
    return part.stat().st_size


def test_a_pull_that_is_interrupted_ends_at_once_and_the_next_one_goes_on_behind_what_it_fetched(
    shelf: Shelf, stopped: int
) -> None:
    assert stopped in (8192, 12288)
    asked, sent = list[tuple[str, str]](), list[int]()
    with serving(HUB, asked=asked, sent=sent) as endpoint:
        (path,) = shelves.pull(shelf, ROW, endpoint=endpoint)
    assert path.read_bytes() == BYTES
    assert asked == [(ROW.files[0], f"bytes={stopped}-")]
    assert sent == [len(BYTES) - stopped]
    assert leftovers(shelf) == []


def test_what_was_fetched_of_a_file_that_has_changed_since_is_not_mixed_in(shelf: Shelf, stopped: int) -> None:
    asked, new = list[tuple[str, str]](), BYTES[::-1]
    with serving({ROW.repo or "": {ROW.files[0]: new}}, asked=asked) as endpoint:
        (path,) = shelves.pull(shelf, ROW, endpoint=endpoint)
    assert path.read_bytes() == new
    assert asked == [(ROW.files[0], "")]
    assert leftovers(shelf) == []


@pytest.mark.parametrize("kept", [bytes(8192), bytes(len(BYTES)), bytes(len(BYTES) + 1)])
def test_a_piece_that_was_damaged_is_found_before_the_file_counts_as_whole_and_goes_away(
    kept: bytes, shelf: Shelf, stopped: int
) -> None:
    (part,) = leftovers(shelf)
    part.write_bytes(kept)
    with serving(HUB) as endpoint:
        if len(kept) <= len(BYTES):
            error = refusal(lambda: shelves.pull(shelf, ROW, endpoint=endpoint), "download_damaged")
            assert error.remedy == "Pull again: it begins anew."
            assert leftovers(shelf) == [] and not shelf.is_pulled(ROW)
        (path,) = shelves.pull(shelf, ROW, endpoint=endpoint)
    assert path.read_bytes() == BYTES


def test_removing_takes_pieces_of_the_row_away_and_leaves_those_of_others(shelf: Shelf, stopped: int) -> None:
    (part,) = leftovers(shelf)
    others = [part.with_name(f"{part.name.split('.')[0]}.{whose}.incomplete") for whose in ("longlive", "0a1b2c3d")]
    for path in others:
        path.write_bytes(b"theirs")
    assert shelves.remove(shelf, ROW) == stopped
    assert leftovers(shelf) == others or leftovers(shelf) == others[::-1]
    for path in others:
        path.unlink()
    shelves.remove(shelf, ROW)
    assert not shelf.repo(ROW).exists()


def test_a_disk_that_runs_full_while_a_file_goes_on_takes_all_of_it_away(shelf: Shelf, stopped: int) -> None:
    with serving(HUB) as endpoint, no_file_larger_than(len(BYTES) - 2000):
        refusal(lambda: shelves.pull(shelf, ROW, endpoint=endpoint), "disk_full")
    assert leftovers(shelf) == []


def test_what_was_fetched_before_counts_when_room_is_checked(
    shelf: Shelf, stopped: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for free, fits in ((len(BYTES) - stopped - 1, False), (len(BYTES) - stopped, True)):
        usage = namedtuple("usage", "total used free")(10**9, 0, free)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, usage=usage: usage)
        with serving(HUB) as endpoint:
            if fits:
                assert shelves.pull(shelf, ROW, endpoint=endpoint)
            else:
                refusal(lambda: shelves.pull(shelf, ROW, endpoint=endpoint), "disk_full")
                assert len(leftovers(shelf)) == 1


def test_no_network_a_repo_that_is_gone_and_one_behind_a_gate_have_their_own_answers(shelf: Shelf) -> None:
    def pull(endpoint: str) -> None:
        shelves.pull(shelf, ROW, endpoint=endpoint)

    refusal(lambda: pull("http://127.0.0.1:9"), "hub_unreachable")
    with serving({}) as endpoint:
        refusal(lambda: pull(endpoint), "hub_missing")
    with serving(HUB, gated=True) as endpoint:
        refusal(lambda: pull(endpoint), "hub_refused")
    with serving({"gdhe17/Self-Forcing": {"README.md": b"moved"}}) as endpoint:
        assert "self_forcing_dmd.pt" in refusal(lambda: pull(endpoint), "hub_missing").message
    assert leftovers(shelf) == []


def test_a_disk_that_is_too_small_is_told_before_anything_is_fetched(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")(10**9, 10**9 - 100, 100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with serving(HUB) as endpoint:
        refusal(lambda: shelves.pull(shelf, ROW, endpoint=endpoint), "disk_full")
    assert not shelf.is_pulled(ROW)
    assert leftovers(shelf) == []


def test_a_disk_that_runs_full_in_the_middle_is_told_and_nothing_half_written_stays(shelf: Shelf) -> None:
    with serving(HUB) as endpoint:
        with no_file_larger_than(len(BYTES) - 10_000):
            error = refusal(lambda: shelves.pull(shelf, ROW, endpoint=endpoint), "disk_full")
        assert "ran full" in error.message and "connection" not in error.message
        assert not shelf.is_pulled(ROW)
        assert all(path.stat().st_size < 1000 for path in shelf.hub.rglob("*") if path.is_file())
        assert shelves.pull(shelf, ROW, endpoint=endpoint)


@pytest.mark.parametrize(
    ("number", "code"), [(errno.ENOSPC, "disk_full"), (errno.EDQUOT, "disk_full"), (errno.EIO, "hub_unreachable")]
)
def test_a_full_disk_is_known_by_its_number_where_the_hubs_fast_transfer_tells_it_in_words(
    number: int, code: str, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    def transfer(*_: object, **__: object) -> None:
        raise RuntimeError("the fetch failed") from RuntimeError(f"IO Error: {strerror(number)} (os error {number})")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", transfer)
    with serving(HUB) as endpoint:
        refusal(lambda: shelves.pull(shelf, ROW, endpoint=endpoint), code)


def test_a_cache_that_cannot_be_written_is_not_taken_for_a_hub_that_is_away(shelf: Shelf) -> None:
    shelf.hub.write_text("in the way")
    with serving(HUB) as endpoint:
        refusal(lambda: shelves.pull(shelf, ROW, endpoint=endpoint), "out_unwritable")


@pytest.mark.parametrize("name", ["krea-realtime", "longlive", "reward-forcing", "anyflow-far"])
def test_a_licence_that_forbids_or_is_not_stated_wants_a_yes(name: str, shelf: Shelf) -> None:
    row = family(name)
    error = refusal(lambda: shelves.pull(shelf, row, offline=True), "licence_not_accepted")
    assert row.licence in error.message
    assert f"https://huggingface.co/{row.repo}" in error.remedy and "--accept-licence" in error.remedy
    licences.accept(shelf.licences, [row])
    refusal(lambda: shelves.pull(shelf, row, offline=True), "model_not_pulled")


def test_what_another_program_fetched_wants_the_same_yes_before_it_is_converted(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = family("krea-realtime")
    weights = save(dict(tiny(row, monkeypatch).model.state_dict()))
    cached(shelf.hub, row.repo or "", {row.files[0]: weights})
    error = refusal(lambda: shelves.convert(shelf, row, half=False), "licence_not_accepted")
    assert row.licence in error.message and "--accept-licence" in error.remedy
    assert not shelf.models.exists()
    licences.accept(shelf.licences, [row])
    assert shelves.convert(shelf, row, half=False)


def test_the_embedded_student_needs_no_pull(shelf: Shelf) -> None:
    assert shelves.pull(shelf, family("pocket")) == []


def test_a_file_that_comes_with_another_hash_is_dropped_and_the_next_pull_fetches_it_alone(
    shelf: Shelf,
) -> None:
    row, asked = family("longlive"), list[tuple[str, str]]()
    files = {"models/lora.pt": BYTES[:9000], "models/longlive_base.pt": BYTES}
    licences.accept(shelf.licences, [row])
    repo = {row.repo or "": files}
    with serving(repo, asked=asked, wrong=frozenset({"models/longlive_base.pt"})) as endpoint:
        error = refusal(lambda: shelves.pull(shelf, row, endpoint=endpoint), "download_damaged")
    assert "models/longlive_base.pt" in error.message and "Pull again" in error.remedy
    assert len(asked) == 2, "what came damaged is not asked for again at once"
    assert list(shelf.pulled(row)) == ["models/lora.pt"]
    assert [path.stat().st_size for path in shelf.repo(row).glob("blobs/*")] == [9000]
    assert not any(path.is_symlink() and not path.exists() for path in shelf.hub.rglob("*"))
    asked.clear()
    with serving(repo, asked=asked) as endpoint:
        assert [path.read_bytes() for path in shelves.pull(shelf, row, endpoint=endpoint)] == [BYTES, BYTES[:9000]]
    assert asked == [("models/longlive_base.pt", "")]


def test_a_file_of_ones_own_that_a_link_in_the_cache_leads_to_is_not_taken_away(shelf: Shelf, tmp_path: Path) -> None:
    mine = tmp_path / "mine.pt"
    mine.write_bytes(b"not what the hub has")
    with serving(HUB) as endpoint:
        shelves.pull(shelf, ROW, endpoint=endpoint)
        (link,) = shelf.repo(ROW).glob(f"snapshots/*/{ROW.files[0]}")
        link.unlink()
        link.symlink_to(mine)
        (path,) = shelves.pull(shelf, ROW, endpoint=endpoint)
    assert path.read_bytes() == BYTES
    assert mine.read_bytes() == b"not what the hub has"


def test_a_file_that_lies_damaged_in_the_cache_is_told_offline_and_fetched_anew_by_a_pull(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(path: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, strerror(errno.EROFS))

    with serving(HUB) as endpoint:
        (path,) = shelves.pull(shelf, ROW, endpoint=endpoint)
    path.write_bytes(BYTES[::-1])
    for look in (lambda: shelves.pull(shelf, ROW, offline=True), lambda: list(shelves.check_pulled(shelf, ROW))):
        assert f"models pull {ROW.name}" in refusal(look, "download_damaged").remedy
        assert path.read_bytes() == BYTES[::-1]
    asked = list[tuple[str, str]]()
    with serving(HUB, asked=asked) as endpoint:
        with monkeypatch.context() as locked:
            locked.setattr(Path, "unlink", read_only)
            refusal(lambda: shelves.pull(shelf, ROW, endpoint=endpoint), "out_unwritable")
        (path,) = shelves.pull(shelf, ROW, endpoint=endpoint)
    assert path.read_bytes() == BYTES
    assert asked == [(ROW.files[0], "")]


def test_one_changed_byte_in_the_hubs_cache_is_found(shelf: Shelf) -> None:
    row = family("anyflow-far")
    files = {"transformer/config.json": b"{}", "transformer/diffusion_pytorch_model.safetensors": BYTES}
    folder = cached(shelf.hub, row.repo or "", files)
    assert len(list(shelves.check_pulled(shelf, row))) == 2
    for blob in (folder / "blobs").iterdir():
        content = blob.read_bytes()
        blob.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        refusal(lambda: list(shelves.check_pulled(shelf, row)), "download_damaged")
        blob.write_bytes(content)


def tiny(row: Family, monkeypatch: pytest.MonkeyPatch) -> Student:
    """The row's base becomes small, and a student of that size."""
    shape = StudentConfig(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=48,
        num_layers=1,
    )
    monkeypatch.setitem(BASES, row.base, replace(BASES[row.base], shape=shape))
    torch.manual_seed(0)
    return Student(shape)


def test_what_was_pulled_is_converted_verified_and_removed(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = tiny(ROW, monkeypatch)
    weights = {f"model.{name}": value for name, value in student.model.state_dict().items()}
    torch.save({"generator_ema": weights}, tmp_path / "c.pt")
    content = (tmp_path / "c.pt").read_bytes()
    refusal(lambda: shelves.convert(shelf, ROW, half=False), "model_not_pulled")
    cached(shelf.hub, ROW.repo or "", {ROW.files[0]: content})
    assert shelves.convert(shelf, ROW, half=False)
    assert not shelves.convert(shelf, ROW, half=False)
    assert shelf.is_converted(ROW)
    shelves.verify(shelf.converted(ROW))
    made = load_file(shelf.converted(ROW) / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(value, student.model.state_dict()[name]) for name, value in made.items())
    freed = shelves.remove(shelf, ROW)
    assert freed > len(content)
    assert not shelf.is_converted(ROW) and not shelf.is_pulled(ROW)
    assert not shelf.repo(ROW).exists()


@pytest.mark.parametrize("damage", [lambda content: content[:-100], lambda content: content[:-9] + b"?" + content[-8:]])
def test_what_was_damaged_on_its_way_is_not_converted(
    damage: Callable[[bytes], bytes], shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = family("krea-realtime")
    content = save(dict(tiny(row, monkeypatch).model.state_dict()))
    cached(shelf.hub, row.repo or "", {row.files[0]: content})
    shelf.pulled(row)[row.files[0]].write_bytes(damage(content))
    licences.accept(shelf.licences, [row])
    error = refusal(lambda: shelves.convert(shelf, row, half=False), "download_damaged")
    assert error.remedy == f"Pull again: `stillstream models pull {row.name}` fetches that file anew."
    assert not shelf.models.exists()
    with serving({row.repo or "": {row.files[0]: content}}) as endpoint:
        shelves.pull(shelf, row, endpoint=endpoint)
    assert shelves.convert(shelf, row, half=False)


def test_removing_one_family_leaves_another_of_the_same_repo(shelf: Shelf) -> None:
    one, two = family("causal-forcing"), family("causal-forcing-2step")
    cached(shelf.hub, one.repo or "", {one.files[0]: BYTES, two.files[0]: BYTES[::-1]})
    assert shelves.remove(shelf, one) == len(BYTES)
    assert not shelf.is_pulled(one)
    assert shelf.is_pulled(two)
    assert list(shelves.check_pulled(shelf, two))
    assert shelves.remove(shelf, one) == 0


def test_what_is_embedded_is_not_converted(shelf: Shelf) -> None:
    refusal(lambda: shelves.convert(shelf, family("pocket"), half=False), "model_not_convertible")


def test_a_pull_that_was_interrupted_is_not_taken_for_whole(shelf: Shelf) -> None:
    row = family("longlive")
    folder = cached(shelf.hub, row.repo or "", {row.files[0]: BYTES})
    assert not shelf.is_pulled(row)
    licences.accept(shelf.licences, [row])
    refusal(lambda: shelves.pull(shelf, row, offline=True), "model_not_pulled")
    assert (folder / "snapshots" / COMMIT).is_dir()


def test_a_cpu_has_the_machines_memory_and_a_gpu_its_own_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def told(device: str) -> tuple[int, int]:
        asked.append(device)
        return 20 * 10**9, 80 * 10**9

    monkeypatch.setattr("app.shelf.psutil.virtual_memory", lambda: SimpleNamespace(available=64 * 10**9))
    monkeypatch.setattr("torch.cuda.mem_get_info", told)
    assert shelves.room("cpu") == Room(64 * 10**9)
    assert shelves.room("cuda:1") == Room(20 * 10**9, 64 * 10**9)
    assert asked == ["cuda:1"]


def test_a_device_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(device: str) -> tuple[int, int]:
        raise RuntimeError("CUDA error: invalid device ordinal")

    monkeypatch.setattr("torch.cuda.mem_get_info", fails)
    refusal(lambda: shelves.room("cuda:7"), "device_unusable")
