"""A family from a hub on this machine to pictures: pull, convert, verify, serve; and what each missing part says."""

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from app import licences
from app import shelf as shelves
from app.cli_models import named, told_licence
from app.clip import read_clip
from app.errors import AppError
from app.generate import generate
from app.shelf import Shelf
from app.stopwatch import Stopwatch
from app.worker import LoadEngine
from pipeline.bases import BASES, TextWeights
from pipeline.chunk import Controls
from pipeline.config import WanModel
from pipeline.convert import convert
from pipeline.downloads import WAN_TEXT, WAN_TINY
from pipeline.errors import PipelineError
from pipeline.memory import Setup, plan
from pipeline.models import family
from pipeline.own import rule_of
from pipeline.wan import load_wan
from tests.app.hub import cached, serving
from tests.app.tiny_wan import ROW, SMALL, repos, shrink_table, tiny_codec
from tests.pipeline.published import peft_lora

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SMALL:
        monkeypatch.setitem(BASES, name, BASES[name])  # put back afterwards
    shrink_table()


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path / "hub", tmp_path / "models")


def chosen(
    shelf: Shelf, *, name: str = ROW.name, size: str = "64x32", decoder: str = "tiny", accept: bool = True
) -> WanModel:
    folders = (shelf.hub, shelf.models)
    found = named(Path(name), "cpu", size=size, decoder=decoder, accept_licence=accept, folders=folders)
    assert isinstance(found, WanModel)
    return found


def refusal(shelf: Shelf, **how: Any) -> AppError | PipelineError:
    with pytest.raises((AppError, PipelineError)) as refused:
        chosen(shelf, **how)
    assert "\n" not in refused.value.message
    return refused.value


@pytest.mark.parametrize(("name", "first"), [(ROW.name, 9), ("anyflow-far", 1)])
def test_a_family_goes_from_the_hub_to_a_clip(name: str, first: int, shelf: Shelf, tmp_path: Path) -> None:
    row = family(name)
    with serving(repos(row)) as endpoint:
        licences.accept(shelf.licences, shelves.whole(row))
        for part in shelves.whole(row):
            shelves.pull(shelf, part, endpoint=endpoint)
    assert all(shelf.is_pulled(part) for part in shelves.whole(row))
    unasked = shelf.repo(WAN_TEXT) / "snapshots"
    assert not list(unasked.rglob("transformer*")), "what nobody asks for stays on the hub"
    assert shelves.convert(shelf, row, half=False)
    shelves.verify(shelf.converted(row))
    for decoder in ("tiny", "full"):
        model = chosen(shelf, name=name, decoder=decoder)
        assert (model.tiny is not None) == (decoder == "tiny")
        assert model.config.pictures(0) == first
        out = tmp_path / f"{decoder}.mp4"
        written = generate(LoadEngine(model, "cpu", 1), Controls("a red ball"), 1.0, out)
        assert written.unknown_words == ()
        assert len(list(read_clip(out, 16, 64, 32))) == 16
    assert len(list(shelf.prompts.rglob("*.safetensors"))) == 1  # read once for both


def test_a_folder_of_which_a_piece_was_damaged_on_its_way_is_not_converted(shelf: Shelf) -> None:
    row = family("anyflow-far")
    cached(shelf.hub, row.repo or "", repos(row)[row.repo or ""])
    licences.accept(shelf.licences, [row])
    piece = next(path for name, path in shelf.pulled(row).items() if name.endswith(".safetensors"))
    content = piece.read_bytes()
    piece.write_bytes(content[:-9] + b"?" + content[-8:])
    with pytest.raises(AppError) as refused:
        shelves.convert(shelf, row, half=False)
    assert refused.value.code == "download_damaged" and not shelf.models.exists()
    piece.write_bytes(content)
    assert shelves.convert(shelf, row, half=False)


def test_serving_asks_for_the_yes_of_a_student_that_was_converted_before_and_tells_its_licence(shelf: Shelf) -> None:
    row = family("longlive")
    everything = repos(row)
    everything[row.repo or ""] |= {row.lora or "": b"thin layers"}
    for repo, files in everything.items():
        cached(shelf.hub, repo, files)
    convert(shelf.pulled(row)[row.files[0]], shelf.converted(row), row.shape, entry=row.weights)
    asked = refusal(shelf, name=row.name, accept=False)
    assert asked.code == "licence_not_accepted" and "--accept-licence" in asked.remedy
    assert row.title in asked.message and WAN_TINY.title in asked.message
    assert told_licence(chosen(shelf, name=row.name)) == (
        "Licence: LongLive 1 (CC-BY-NC-SA-4.0: not for commercial use); "
        "The tiny decoder and encoder of Wan's latents, taew2_1 of TAEHV (MIT (of the code): read it first)."
    )
    assert "tiny" not in (told_licence(chosen(shelf, name=row.name, decoder="full", accept=False)) or "")
    assert told_licence(None) is None


def test_a_folder_of_your_own_that_has_a_familys_name_does_not_have_its_licence(shelf: Shelf, tmp_path: Path) -> None:
    for repo, files in repos().items():
        cached(shelf.hub, repo, files)
    folder = tmp_path / "elsewhere" / "longlive" / "transformer"
    convert(shelf.pulled(ROW)[ROW.files[0]], folder, ROW.shape, entry=ROW.weights, rule=rule_of(ROW, "longlive"))
    model = chosen(shelf, name=str(folder.parent), decoder="full")
    assert model.config.name == "longlive" and told_licence(model) is None
    assert told_licence(chosen(shelf, name=str(folder.parent))) == (
        "Licence: The tiny decoder and encoder of Wan's latents, taew2_1 of TAEHV (MIT (of the code): read it first)."
    )


def command(shelf: Shelf, *words: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    clean = {name: value for name, value in os.environ.items() if not name.startswith("STILLSTREAM_")}
    where = {"HF_HUB_CACHE": str(shelf.hub), "STILLSTREAM_MODELS": str(shelf.models), "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "tests.app.tiny_wan", *words, "--model", ROW.name, "--size", "64x32", "--threads", "1"],
        capture_output=True,
        text=True,
        timeout=300,
        env=clean | where | environment,
        check=False,
    )


def test_the_command_asks_for_a_yes_keeps_it_and_tells_the_licence(shelf: Shelf, tmp_path: Path) -> None:
    for repo, files in repos().items():
        cached(shelf.hub, repo, files)
    shelves.convert(shelf, ROW, half=True)
    clip = tmp_path / "clip.mp4"
    draw = ("generate", "--prompt", "a red ball", "--seconds", "0.5", "--decoder", "tiny", "--out", str(clip))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        serve = ("serve", "--port", str(taken.getsockname()[1]))
        refused = command(shelf, *serve)
        assert refused.stderr.startswith("licence_not_accepted: ") and refused.returncode == 2, refused.stderr
        assert len(refused.stderr.splitlines()) == 1
        served = command(shelf, *serve, STILLSTREAM_ACCEPT_LICENCE="1")
    told = [line.split(":")[0] for line in served.stderr.splitlines()]
    assert told == ["Licence", "port_taken"], served.stderr
    drawn = command(shelf, *draw)  # the yes was remembered
    assert (drawn.returncode, drawn.stdout) == (0, f"Wrote {clip}\n"), drawn.stderr
    assert drawn.stderr.splitlines()[0] == (
        "Licence: Self-Forcing (DMD) (Apache-2.0); "
        "The tiny decoder and encoder of Wan's latents, taew2_1 of TAEHV (MIT (of the code): read it first)."
    )


def test_the_text_encoder_gives_way_where_the_gpu_is_too_small_for_all(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    for repo, files in repos().items():
        cached(shelf.hub, repo, files)
    shelves.convert(shelf, ROW, half=False)
    monkeypatch.setitem(BASES, "wan-1.3b", replace(BASES["wan-1.3b"], text=TextWeights(layers=1000)))
    whole = plan(ROW, Setup(width=64, height=32, tiny=True)).device
    for free, place in ((whole, "cuda"), (whole - 1, "cpu")):
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda device, free=free: (free, whole))
        model = named(Path(ROW.name), "cuda", size="64x32", accept_licence=True, folders=(shelf.hub, shelf.models))
        assert isinstance(model, WanModel) and model.text_device == place


def test_a_text_device_that_is_asked_for_is_where_the_text_encoder_reads_and_the_words_are_the_same(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    for repo, files in repos().items():
        cached(shelf.hub, repo, files)
    shelves.convert(shelf, ROW, half=False)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (10**12, 10**12))

    def asked(device: str, text_device: str) -> WanModel:
        folders = (shelf.hub, shelf.models)
        model = named(
            Path(ROW.name), device, size="64x32", text_device=text_device, accept_licence=True, folders=folders
        )
        assert isinstance(model, WanModel)
        return replace(model, prompts=None)

    for place in ("cuda", "cuda:0", "cpu", "swap", "cuda:1"):
        assert asked("cuda", place).text_device == ("cuda" if place == "cuda:0" else place)
    assert [asked("cpu", place).text_device for place in ("auto", "cpu", "swap")] == ["cpu"] * 3
    here, swapped = (load_wan(replace(asked("cpu", "cpu"), text_device=each), "cpu")[2] for each in ("cpu", "swap"))
    assert torch.equal(here.embed("a red ball"), swapped.embed("a red ball"))


def test_a_student_and_a_text_encoder_in_eight_bits_draw_a_clip(shelf: Shelf, tmp_path: Path) -> None:
    for repo, files in repos().items():
        cached(shelf.hub, repo, files)
    shelves.convert(shelf, ROW, half=True)
    model = named(
        Path(ROW.name), "cpu", size="64x32", bits=8, text_bits=8, accept_licence=True, folders=(shelf.hub, shelf.models)
    )
    assert isinstance(model, WanModel) and (model.bits, model.text_bits) == (8, 8)
    generate(LoadEngine(model, "cpu", 1), Controls("a red ball"), 1.0, tmp_path / "small.mp4")
    assert len(list(read_clip(tmp_path / "small.mp4", 16, 64, 32))) == 16


def test_a_clip_may_begin_with_a_picture_and_follow_a_video(shelf: Shelf, tmp_path: Path) -> None:
    for repo, files in repos().items():
        cached(shelf.hub, repo, files)
    shelves.convert(shelf, ROW, half=True)
    load = LoadEngine(chosen(shelf), "cpu", 1)
    generate(load, Controls("a red ball"), 2.0, tmp_path / "one.mp4")
    for image, clip in ((tmp_path / "one.mp4", None), (None, tmp_path / "one.mp4")):
        generate(load, Controls("a blue ball", strength=0.5), 1.5, tmp_path / "two.mp4", image=image, clip=clip)
        assert len(list(read_clip(tmp_path / "two.mp4", 16, 64, 32))) == 24


def test_a_source_is_encoded_by_the_tiny_encoder_and_by_the_autoencoder_where_the_file_has_none(shelf: Shelf) -> None:
    everything = repos()
    for repo, files in everything.items():
        cached(shelf.hub, repo, files)
    shelves.convert(shelf, ROW, half=False)
    controls = Controls("a red ball", strength=0.0)
    source = np.random.default_rng(0).integers(0, 256, (12, 32, 64, 3), dtype=np.uint8)

    def kept(decoder: str) -> np.ndarray:
        engine = LoadEngine(chosen(shelf, decoder=decoder), "cpu", 1)(Stopwatch().trace)
        state = engine.open(controls.seed)
        latents = [engine.step(state, controls, source).latents_TCHW for _ in range(2)]
        assert all(np.isfinite(each).all() for each in latents)
        return np.concatenate(latents)

    full, tiny = kept("full"), kept("tiny")
    assert tiny.shape == full.shape == (6, 16, 4, 8)
    assert np.abs(tiny - full).max() > 0.1
    chosen(shelf).tiny.write_bytes(tiny_codec(encodes=False))
    np.testing.assert_allclose(kept("tiny"), full, atol=1e-5)


def test_low_rank_weights_are_worn_live_and_exchanged_between_chunks(shelf: Shelf, tmp_path: Path) -> None:
    for repo, files in repos().items():
        cached(shelf.hub, repo, files)
    shelves.convert(shelf, ROW, half=False)
    paths = []
    for layer in ("blocks.0.attn1.to_q", "blocks.1.attn2.to_k"):
        paths.append(tmp_path / f"{layer.replace('.', '-')}.safetensors")
        weights = peft_lora([layer], {f"{layer}.weight": torch.Size((24, 24))})
        save_file({name: 30 * value for name, value in weights.items()}, paths[-1])
    engine = LoadEngine(chosen(shelf), "cpu", 1, tuple(paths), 0.5)(Stopwatch().trace)
    assert engine.config.loras == (paths[0].stem, paths[1].stem)
    assert engine.config.lora_strength == 0.5

    def drawn(lora: str = "", strength: float = 1.0) -> bytes:
        controls = Controls("a red ball", lora=lora, lora_strength=strength)
        return engine.step(engine.open(7), controls).latents_TCHW.tobytes()

    plain, first, weak, second = drawn(), drawn(paths[0].stem), drawn(paths[0].stem, 0.2), drawn(paths[1].stem)
    assert len({plain, first, weak, second}) == 4
    assert drawn() == plain
    with pytest.raises(PipelineError) as unknown:
        drawn("another")
    assert unknown.value.code == "lora_unknown"
    with pytest.raises(PipelineError) as twice:
        LoadEngine(chosen(shelf), "cpu", 1, (paths[0], paths[0]))(Stopwatch().trace)
    assert twice.value.code == "lora_twice"
    save_file(peft_lora(["blocks.0.attn1.to_q"], {"blocks.0.attn1.to_q.weight": torch.Size((48, 24))}), paths[0])
    with pytest.raises(PipelineError) as wrong:
        LoadEngine(chosen(shelf), "cpu", 1, (paths[0],))(Stopwatch().trace)
    assert wrong.value.code == "lora_mismatch"


def test_each_missing_step_says_what_to_do(shelf: Shelf) -> None:
    assert refusal(shelf, accept=False).code == "model_not_converted"
    assert "after a pull" in refusal(shelf, accept=False).remedy
    everything = repos()
    cached(shelf.hub, ROW.repo or "", everything[ROW.repo or ""])
    assert "after a pull" not in refusal(shelf, accept=False).remedy
    shelves.convert(shelf, ROW, half=False)
    assert refusal(shelf, accept=False).code == "model_not_pulled"
    cached(shelf.hub, WAN_TEXT.repo or "", everything[WAN_TEXT.repo or ""])
    assert "pull wan-tiny" in refusal(shelf, accept=False).remedy
    assert chosen(shelf, decoder="full", accept=False).tiny is None
    cached(shelf.hub, WAN_TINY.repo or "", everything[WAN_TINY.repo or ""])
    assert "taew2_1" in refusal(shelf, accept=False).message
    assert refusal(shelf, accept=False).code == "licence_not_accepted"
    assert chosen(shelf).config.width == 64
    assert chosen(shelf, accept=False).config.width == 64  # the yes is remembered
    assert refusal(shelf, size="70x32").code == "size_invalid"
    assert refusal(shelf, size="big").code == "setting_invalid"
    assert refusal(shelf, decoder="best").code == "setting_invalid"
    assert refusal(shelf, size="40000x40000").code == "memory_short"
    assert refusal(shelf, name="anyflow-far").code == "model_not_converted"
    with pytest.raises(AppError) as fixed:
        named(Path("pocket"), "cpu", size="64x32")
    assert fixed.value.code == "setting_invalid"
