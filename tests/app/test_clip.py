"""Video files in and out."""

from pathlib import Path

import av
import numpy as np
import pytest

from app.clip import read_clip, write_clip
from app.errors import AppError
from app.generate import generate
from pipeline.chunk import Controls
from tests.app.fakes import CONFIG, load_fake

WIDTH, HEIGHT = 64, 32


def _ramp(count: int) -> np.ndarray:
    """Frames that grow brighter."""
    levels = np.linspace(20, 230, count).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (count, HEIGHT, WIDTH, 3)).copy()


@pytest.mark.parametrize("name", ["clip.mp4", "clip.webm"])
def test_a_written_clip_reads_back_as_the_same_frames(tmp_path: Path, name: str) -> None:
    frames_THWC = _ramp(8)
    with write_clip(tmp_path / name, 10) as clip:
        clip.write(frames_THWC[:5])
        clip.write(frames_THWC[5:])
    read_THWC = np.stack(list(read_clip(tmp_path / name, 10, WIDTH, HEIGHT)))

    assert read_THWC.shape == frames_THWC.shape
    assert np.abs(read_THWC.astype(int) - frames_THWC).mean() < 12
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_webp_is_an_animation(tmp_path: Path) -> None:
    with write_clip(tmp_path / "clip.webp", 10) as clip:
        clip.write(_ramp(8))

    assert (tmp_path / "clip.webp").read_bytes().count(b"ANMF") == 8


def test_an_mp4_is_h264(tmp_path: Path) -> None:
    with write_clip(tmp_path / "clip.mp4", 16) as clip:
        clip.write(_ramp(4))
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "h264"


@pytest.mark.parametrize(("fps", "count"), [(5, 10), (20, 40)])
def test_a_clip_of_another_rate_keeps_its_length_in_time(tmp_path: Path, fps: int, count: int) -> None:
    with write_clip(tmp_path / "clip.mp4", 10) as clip:
        clip.write(_ramp(20))
    read = list(read_clip(tmp_path / "clip.mp4", fps, WIDTH, HEIGHT))

    assert abs(len(read) - count) <= 1


def test_a_file_that_is_not_a_video_says_so(tmp_path: Path) -> None:
    path = tmp_path / "notes.mp4"
    path.write_text("not a video")
    with pytest.raises(AppError) as error:
        list(read_clip(path, 16, WIDTH, HEIGHT))

    assert error.value.code == "clip_unreadable"


def test_a_clip_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(AppError) as error:
        list(read_clip(tmp_path / "none.mp4", 16, WIDTH, HEIGHT))

    assert error.value.code == "clip_unreadable"
    assert "no such file" in error.value.message


@pytest.mark.parametrize("name", ["missing/clip.mp4", "clip.txt"])
def test_a_place_that_cannot_be_written_says_so(tmp_path: Path, name: str) -> None:
    with pytest.raises(AppError) as error, write_clip(tmp_path / name, 16):
        pass

    assert error.value.code == "out_unwritable"


def test_a_clip_that_breaks_off_leaves_the_old_one_whole(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_text("the old one")

    def break_off() -> None:
        with write_clip(path, 16) as clip:
            clip.write(_ramp(4))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        break_off()

    assert path.read_text() == "the old one"
    assert [found.name for found in tmp_path.iterdir()] == ["clip.mp4"]


def test_a_generated_clip_has_the_length_and_colour_that_were_asked_for(tmp_path: Path) -> None:
    generate(load_fake, Controls("a green ball"), 0.6, tmp_path / "clip.mp4")
    read_THWC = np.stack(list(read_clip(tmp_path / "clip.mp4", CONFIG.fps, WIDTH, HEIGHT)))

    assert len(read_THWC) == round(0.6 * CONFIG.fps)
    assert read_THWC.mean((0, 1, 2)).argmax() == 1


def test_the_same_seed_makes_the_same_latents(tmp_path: Path) -> None:
    for name in ("one", "two"):
        out, latents = tmp_path / f"{name}.mp4", tmp_path / f"{name}.safetensors"
        generate(load_fake, Controls("a red ball", seed=3), 0.5, out, latents=latents)

    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()


def test_a_generated_clip_follows_its_input_and_ends_with_it(tmp_path: Path) -> None:
    source, out = tmp_path / "source.mp4", tmp_path / "clip.mp4"
    with write_clip(source, CONFIG.fps) as clip:
        clip.write(_ramp(6))
    generate(load_fake, Controls("a red ball", strength=0.0), 5.0, out, clip=source)
    read_THWC = np.stack(list(read_clip(out, CONFIG.fps, WIDTH, HEIGHT)))

    assert len(read_THWC) == 2 * CONFIG.frames_per_chunk
    assert read_THWC[0].mean() < 60
    assert read_THWC[-1].mean() > 190


def test_frames_are_counted_as_they_are_made(tmp_path: Path) -> None:
    started: list[int] = []
    made: list[int] = []
    generate(load_fake, Controls("a red ball"), 0.6, tmp_path / "c.mp4", on_start=started.append, on_chunk=made.append)

    assert started == [10]
    assert made == [4, 4, 2]
