"""A folder of videos becomes clips that a Wan run trains on; what is stopped, changed or damaged costs only itself."""

import errno
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from app.cli import app
from pipeline.chunk import Controls
from pipeline.codec import PocketCodec
from pipeline.config import CacheConfig, CodecConfig, ModelConfig
from pipeline.engine import Engine
from pipeline.errors import PipelineError
from pipeline.student import Student
from pipeline.text import TextEncoder
from pipeline.training import encode as encoding
from pipeline.training.encode import RECORD, Embed, Record, Shape, encode
from pipeline.training.precomputed import UNPROMPTED, Precomputed
from pipeline.training.settings import WanSettings, WanStageSettings
from pipeline.training.wan import run_wan
from pipeline.training.wan_text import load_embed
from pipeline.wan_codec import WanCodec, load_wan_codec
from pipeline.weights import export
from tests.pipeline.training.test_footage import shot
from tests.pipeline.training.tiny_wan import TEXT_DIM, write_tiny_wan

SHAPE = Shape(width=96, height=64, fps=16, latents=6, model="tiny")
PLACES = 6


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wan")
    write_tiny_wan(folder)
    return folder


@pytest.fixture(scope="module")
def codec(wan: Path) -> WanCodec:
    return load_wan_codec(wan / "vae")


@pytest.fixture(scope="module")
def embed(wan: Path) -> Embed:
    return load_embed(wan, places=PLACES)


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Two that can be used: of two clips of 21 pictures and of one."""
    folder = tmp_path / "videos"
    folder.mkdir()
    for name, frames, said in (("long", 44, "red left"), ("short", 22, "a blue right")):
        shot(folder / f"{name}.mp4", frames=frames)
        (folder / f"{name}.txt").write_text(said)
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


class Counting:
    """An autoencoder that counts, and may end the process or fill the disk at a clip."""

    def __init__(self, codec: WanCodec, ends_at: int = 99) -> None:
        self.codec, self.ends_at, self.clips = codec, ends_at, 0

    def remember(self) -> Any:
        return self.codec.remember()

    def encode_push(self, memory: Any, frames_TCHW: Tensor) -> Tensor | None:
        if self.clips == self.ends_at:
            raise KeyboardInterrupt
        self.clips += 1
        return self.codec.encode_push(memory, frames_TCHW)


def run(videos: Path, out: Path, codec: Any, embed: Embed) -> Record:
    return encode(videos, out, SHAPE, codec, embed, show=False)


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_each_video_gives_as_many_clips_as_fit_with_its_captions_embedding(
    videos: Path, out: Path, codec: WanCodec, embed: Embed
) -> None:
    record = run(videos, out, codec, embed)
    assert record.told() == "3 clips of 2 videos encoded, 0 files skipped."
    names = ["long.mp4-0000.safetensors", "long.mp4-0001.safetensors", "short.mp4-0000.safetensors", UNPROMPTED]
    assert sorted(path.name for path in out.glob("*.safetensors")) == names
    clip = load_file(out / names[0])
    assert clip["latents"].shape == (6, 4, 8, 12)
    assert clip["text"].shape == (1, 3, TEXT_DIM)  # two words and the end
    expected = embed(["red left"])
    torch.testing.assert_close(clip["text"].float(), expected[:, :3], atol=0, rtol=1e-2)
    assert not expected[:, 3:].any()
    assert not torch.equal(clip["latents"], load_file(out / names[1])["latents"])


def test_the_same_videos_give_the_same_bytes(videos: Path, out: Path, codec: WanCodec, embed: Embed) -> None:
    run(videos, out, codec, embed)
    again = out.with_name("again")
    run(videos, again, codec, embed)
    assert contents(out) == contents(again)


@pytest.mark.parametrize("ends_at", [0, 1, 2])
def test_a_stopped_run_goes_on_and_ends_with_the_same_bytes(
    videos: Path, out: Path, codec: WanCodec, embed: Embed, ends_at: int
) -> None:
    whole = out.with_name("whole")
    run(videos, whole, codec, embed)
    with pytest.raises(KeyboardInterrupt):
        run(videos, out, Counting(codec, ends_at), embed)
    rest = Counting(codec)
    run(videos, out, rest, embed)
    assert rest.clips == (1 if ends_at == 2 else 3)
    assert contents(out) == contents(whole)


def test_what_is_done_is_not_done_again_unless_its_caption_changes(
    videos: Path, out: Path, codec: WanCodec, embed: Embed
) -> None:
    run(videos, out, codec, embed)
    before = contents(out)
    (videos / "short.txt").write_text("red right")
    again = Counting(codec)
    run(videos, out, again, embed)
    assert again.clips == 1
    after = contents(out)
    assert {name for name in before if before[name] != after[name]} == {RECORD, "short.mp4-0000.safetensors"}


def test_bad_files_are_skipped_listed_and_remembered(videos: Path, out: Path, codec: WanCodec, embed: Embed) -> None:
    shot(videos / "tiny.mp4", frames=5)
    (videos / "broken.mp4").write_bytes(b"no video at all")
    for name in ("tiny", "broken", "gone"):
        (videos / f"{name}.txt").write_text("red")
    shutil.copy(videos / "tiny.mp4", videos / "silent.mp4")
    for _ in range(2):
        record = run(videos, out, codec, embed)
        assert record.skipped.keys() == {"tiny.mp4", "broken.mp4", "gone.txt", "silent.mp4"}
        assert record.skipped["tiny.mp4"] == "it has 5 of 21 pictures at 16 a second"
        assert json.loads((out / RECORD).read_text())["skipped"] == record.skipped
    assert "3 clips of 2 videos encoded, 4 files skipped." in record.told()
    assert "  gone.txt: its caption has no clip" in record.told()


def test_a_disk_that_fills_up_keeps_what_was_encoded(
    videos: Path, out: Path, codec: WanCodec, embed: Embed, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = encoding.write_clip

    def full(path: Path, latents: Tensor, text: Tensor) -> None:
        if "short" in path.name:
            path.write_bytes(b"half a")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, latents, text)

    monkeypatch.setattr(encoding, "write_clip", full)
    with pytest.raises(PipelineError) as refused:
        run(videos, out, codec, embed)
    assert refused.value.code == "disk_full"
    assert sorted(path.name for path in out.iterdir()) == [
        RECORD,
        "long.mp4-0000.safetensors",
        "long.mp4-0001.safetensors",
        UNPROMPTED,
    ]


def test_clips_of_two_shapes_are_not_mixed(videos: Path, out: Path, codec: WanCodec, embed: Embed) -> None:
    run(videos, out, codec, embed)
    with pytest.raises(PipelineError) as refused:
        encode(videos, out, replace(SHAPE, fps=8, model="another"), codec, embed, show=False)
    assert (refused.value.code, "another fps, model" in refused.value.message) == ("data_of_another_kind", True)


def test_a_folder_that_gives_nothing_says_why(tmp_path: Path, out: Path, codec: WanCodec, embed: Embed) -> None:
    with pytest.raises(PipelineError) as empty:
        run(tmp_path, out, codec, embed)
    assert empty.value.code == "data_empty"
    (tmp_path / "a.txt").write_text("red")
    with pytest.raises(PipelineError) as lonely:
        run(tmp_path, out, codec, embed)
    assert lonely.value.code == "captions_without_clips"
    shot(tmp_path / "a.mp4", frames=3)
    with pytest.raises(PipelineError) as short:
        run(tmp_path, out, codec, embed)
    assert (short.value.code, RECORD in short.value.remedy) == ("data_empty", True)


def test_prompts_do_not_hang_on_what_stands_beside_them_and_long_ones_are_cut(embed: Embed) -> None:
    both, alone = embed(["red left", "a blue right"]), embed(["red left"])
    torch.testing.assert_close(both[:1], alone)
    assert embed(["red " * 40]).shape == (1, PLACES, TEXT_DIM)


def test_without_the_text_encoders_files_one_sentence_says_so(wan: Path, tmp_path: Path) -> None:
    with pytest.raises(PipelineError) as missing:
        load_embed(tmp_path)
    assert missing.value.code == "weights_missing"
    shutil.copytree(wan, tmp_path / "wan")
    (tmp_path / "wan" / "text_encoder" / "model.safetensors").write_bytes(b"half a")
    with pytest.raises(PipelineError) as damaged:
        load_embed(tmp_path / "wan")
    assert (damaged.value.code, "\n" in damaged.value.message) == ("weights_damaged", False)


def beside(folder: Path, config: ModelConfig) -> ModelConfig:
    """A model folder whose other parts complete the export, for these latents and these embeddings."""
    torch.manual_seed(0)
    fitting = replace(
        config,
        chunk=3,
        cache=CacheConfig(sink=3, window=6),
        codec=CodecConfig(latent_channels=4, spatial_stride=8, widths=(8, 12, 16)),
        text=replace(config.text, length=PLACES),
        student=replace(config.student, in_channels=4, out_channels=4, text_dim=TEXT_DIM, control_channels=0),
    )
    text = TextEncoder(fitting.text, TEXT_DIM)
    export(folder, fitting, PocketCodec(fitting.codec), text, Student(fitting.student))
    return fitting


def test_from_videos_to_a_student_that_streams(
    videos: Path, out: Path, wan: Path, config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.cli.calm_openmp", lambda threads: None)
    words: Sequence[str] = (
        *("encode", str(videos), "--model", str(wan), "--out", str(out), "--width", "96", "--height", "64"),
        *("--latents", "6", "--places", str(PLACES), "--threads", "1"),
    )
    ended = CliRunner().invoke(app, words)
    assert ended.exit_code == 0, ended.output
    assert "3 clips of 2 videos encoded" in ended.output
    model = beside(tmp_path / "beside", config)
    assert Precomputed(out, model, seed=0).chunks == 2
    stage = WanStageSettings(budget_s=1e9, steps=2, batch=2, warm_up_steps=1, learning_rate=1e-3)
    settings = WanSettings(
        model=model, data=out, beside=tmp_path / "beside", precision="fp32", teacher=stage, student=stage
    )
    run_wan(tmp_path / "run", settings)
    engine = Engine.load(tmp_path / "run" / "export")
    chunk = engine.step(engine.open(seed=1), Controls("red ball", seed=1))
    assert chunk.frames_THWC.shape == (12, 64, 96, 3)
