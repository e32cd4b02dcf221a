"""A folder of somebody's clips: what can be used is used, the rest is skipped and listed with its reason."""

import json
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from pipeline.codec import PocketCodec
from pipeline.config import ModelConfig
from pipeline.errors import PipelineError
from pipeline.training.autoencoder import Crops, item_rng
from pipeline.training.clips import CHUNKS, Clips, encode_clips
from pipeline.training.footage import find_clips, take_in, told

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


def shot(path: Path, *, frames: int = 40, fps: int = 16, size: tuple[int, int] = (160, 64), red: int = 200) -> None:
    """A grey ramp that brightens with time, its left half reddish."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "8"})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for k in range(frames):
            picture = np.full((size[1], size[0], 3), 20 + 200 * k // frames, np.uint8)
            picture[:, : size[0] // 2, 0] = red
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def shortest(config: ModelConfig) -> int:
    return CHUNKS * config.frames_per_chunk


def test_clips_are_taken_in_at_the_models_size_and_rate(tmp_path: Path, config: ModelConfig) -> None:
    shot(tmp_path / "a.mp4", frames=80, fps=32)
    shot(tmp_path / "b.mkv", frames=30, fps=8, size=(64, 160))
    (tmp_path / "a.txt").write_text("A red\n wall")
    (tmp_path / "b.txt").write_text("a tall wall")
    footage = take_in(tmp_path, tmp_path / "out", config, shortest(config))
    assert [take.shape for take in footage.takes] == [
        (pytest.approx(40, abs=1), config.height, config.width, 3),
        (pytest.approx(60, abs=2), config.height, config.width, 3),
    ]
    assert footage.captions == ["A red wall", "a tall wall"]
    assert footage.words() == ("a", "red", "tall", "wall")
    steps = np.diff(footage.takes[0][:, 32, 80].astype(int).mean(-1))
    assert (steps > 0).all()  # time goes on evenly, no picture is shown twice
    left, right = footage.takes[0][5, 32, 8], footage.takes[0][5, 32, -8]
    assert int(left[0]) - int(left[1]) > 80 > abs(int(right[0]) - int(right[1]))


def test_what_cannot_be_used_is_skipped_and_listed(tmp_path: Path, config: ModelConfig) -> None:
    shot(tmp_path / "good.mp4")
    shot(tmp_path / "short.mp4", frames=5)
    shot(tmp_path / "silent.mp4")
    (tmp_path / "broken.mp4").write_bytes(b"no video at all")
    rows = ["file,caption", "good.mp4,a wall", "short.mp4,a wall", "broken.mp4,a wall", "gone.mp4,a wall"]
    (tmp_path / "captions.csv").write_text("\n".join(rows))
    footage = take_in(tmp_path, tmp_path / "out", config, shortest(config))
    assert len(footage.takes) == 1
    assert set(footage.skipped) == {"short.mp4", "silent.mp4", "broken.mp4", "gone.mp4"}
    assert "5 of 32 pictures" in footage.skipped["short.mp4"]
    assert footage.skipped["silent.mp4"] == "it has no caption"
    assert footage.skipped["gone.mp4"] == "its caption has no clip"
    assert json.loads((tmp_path / "out" / "skipped.json").read_text()) == footage.skipped
    assert told(footage).splitlines()[0] == "1 clips taken in, 4 skipped."


def test_a_clip_that_was_taken_in_is_not_decoded_again(tmp_path: Path, config: ModelConfig) -> None:
    shot(tmp_path / "a.mp4")
    (tmp_path / "a.txt").write_text("a wall")
    first = take_in(tmp_path, tmp_path / "out", config, shortest(config))
    (tmp_path / "a.mp4").write_bytes(b"gone bad since")
    again = take_in(tmp_path, tmp_path / "out", config, shortest(config))
    assert np.array_equal(first.takes[0], again.takes[0])


@pytest.mark.parametrize(
    ("files", "code"),
    [
        ({}, "data_empty"),
        ({"notes.md": "x"}, "data_empty"),
        ({"a.txt": "a wall"}, "captions_without_clips"),
        ({"captions.csv": "file,caption\na.mp4,a wall\n"}, "captions_without_clips"),
        ({"a.mp4": "x"}, "captions_missing"),
        ({"a.mp4": "x", "captions.csv": "name,words\na.mp4,a wall\n"}, "captions_invalid"),
        ({"a.mp4": "x", "a.txt": "a wall"}, "data_empty"),
    ],
)
def test_a_folder_that_gives_nothing_is_refused_with_its_reason(
    tmp_path: Path, config: ModelConfig, files: dict[str, str], code: str
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name, text in files.items():
        (data / name).write_text(text)
    with pytest.raises(PipelineError) as refused:
        take_in(data, tmp_path / "out", config, shortest(config))
    assert refused.value.code == code
    with pytest.raises(PipelineError) as gone:
        find_clips(tmp_path / "nowhere")
    assert gone.value.code == "data_empty"


def test_long_clips_are_cut_from_more_often_and_a_cut_repeats_with_its_numbers(
    tmp_path: Path, config: ModelConfig
) -> None:
    for name, frames, red in (("long", 132, 250), ("brief", 33, 0)):
        shot(tmp_path / f"{name}.mp4", frames=frames, red=red)
        (tmp_path / f"{name}.txt").write_text(name)
    footage = take_in(tmp_path, tmp_path / "out", config, shortest(config))
    cuts = [footage.cut(item_rng(1, k), 32) for k in range(60)]
    assert all(cut.shape == (32, config.height, config.width, 3) for cut, _ in cuts)
    assert 40 < sum(caption == "long" for _, caption in cuts) < 60
    again, caption = footage.cut(item_rng(1, 7), 32)
    assert np.array_equal(again, cuts[7][0])
    assert caption == cuts[7][1]


def test_training_clips_are_cut_from_the_footage_with_its_captions(
    tmp_path: Path, config: ModelConfig, codec: PocketCodec
) -> None:
    shot(tmp_path / "a.mp4")
    (tmp_path / "a.txt").write_text("a red wall")
    footage = take_in(tmp_path, tmp_path / "out", config, shortest(config))
    encode_clips(config, codec, tmp_path / "clips", count=3, seed=1, footage=footage)
    latents, prompts, known, _, movers = Clips(tmp_path / "clips", config, seed=1).batch(0, 2)
    assert latents.shape[:2] == (2, CHUNKS * config.chunk)
    assert prompts == ["a red wall"] * 2 * CHUNKS
    assert known.all()
    assert not movers.any()


def test_crops_are_cut_from_the_footage_too(tmp_path: Path, config: ModelConfig) -> None:
    wide = replace(config, width=192, height=128)
    shot(tmp_path / "a.mp4", size=(192, 128))
    (tmp_path / "a.txt").write_text("a red wall")
    footage = take_in(tmp_path, tmp_path / "out", wide, shortest(wide))
    crops = Crops(wide, 1, 0.0, footage)
    assert all(int(crops[k][..., 0].max()) > 150 for k in range(4))
