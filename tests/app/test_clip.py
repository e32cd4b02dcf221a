"""Video files in and out."""

import re
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from safetensors.numpy import save_file

from app.clip import read_clip, replacing, write_clip
from app.errors import DENSE_ONLY, AppError
from app.generate import generate
from app.worker import Trace
from pipeline.chunk import Chunk, Controls
from tests.app.fakes import CONFIG, FakeEngine, FakeState, load_fake
from tests.limits import no_file_larger_than

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


def test_a_disk_that_runs_full_under_a_clip_or_its_latents_is_told_and_nothing_stays(tmp_path: Path) -> None:
    def write_frames() -> None:
        with write_clip(tmp_path / "clip.mp4", 16) as clip:
            clip.write(np.random.default_rng(0).integers(0, 256, (16, 32, 64, 3), np.uint8))

    def write_latents() -> None:
        with replacing(tmp_path / "latents.safetensors") as part:
            save_file({"latents_TCHW": np.zeros((4, 16, 8, 8), np.float32)}, part)

    for write in (write_frames, write_latents):
        with no_file_larger_than(4000), pytest.raises(AppError) as error:
            write()
        assert error.value.code == "disk_full"
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("files", "code", "named"),
    [
        ({"image": "none.png"}, "clip_unreadable", "none.png"),
        ({"image": "notes.png"}, "clip_unreadable", "notes.png"),
        ({"clip": "notes.png"}, "clip_unreadable", "notes.png"),
        ({"clip": "."}, "clip_unreadable", "directory"),
        ({"out": "missing/clip.mp4"}, "out_unwritable", "missing"),
        ({"out": "clip.txt"}, "out_unwritable", "clip.txt"),
        ({"out": "folder.mp4"}, "out_unwritable", "is a directory"),
        ({"latents": "missing/l.safetensors"}, "out_unwritable", "missing"),
    ],
)
def test_a_file_that_cannot_be_used_is_told_before_the_model_is_loaded(
    files: dict[str, str], code: str, named: str, tmp_path: Path
) -> None:
    def load(trace: Trace) -> FakeEngine:
        raise AssertionError("nothing is loaded")

    (tmp_path / "notes.png").write_text("no picture")
    (tmp_path / "folder.mp4").mkdir()
    places = {name: tmp_path / place for name, place in ({"out": "clip.mp4"} | files).items()}
    with pytest.raises(AppError) as error:
        generate(load, Controls("a red ball"), 0.5, places.pop("out"), **places)  # type: ignore[arg-type]
    assert error.value.code == code and named in error.value.message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.mp4", "notes.png"]


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


def write_of_two_sizes(path: Path) -> None:
    """A clip of which every picture is a JPEG of its own: 6 in one size, then 6 in another."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=CONFIG.fps)
        stream.width, stream.height, stream.pix_fmt = 2 * WIDTH, 2 * HEIGHT, "yuvj420p"
        for index in range(12):
            scale = 2 if index < 6 else 1
            size = (scale * HEIGHT, scale * WIDTH)
            encoder = av.CodecContext.create("mjpeg", "w")
            encoder.height, encoder.width, encoder.pix_fmt = *size, "yuvj420p"
            encoder.time_base = Fraction(1, CONFIG.fps)
            level = 60 if index < 6 else 180
            picture = av.VideoFrame.from_ndarray(np.full((*size, 3), level, np.uint8), format="rgb24")
            picture.pts, picture.time_base = index, Fraction(1, CONFIG.fps)
            for packet in encoder.encode(picture):
                packet.stream, packet.pts, packet.dts = stream, index, index
                packet.time_base = Fraction(1, CONFIG.fps)
                container.mux(packet)


def test_a_clip_that_changes_its_size_goes_on_as_another_source(tmp_path: Path) -> None:
    source, out = tmp_path / "source.mkv", tmp_path / "clip.mp4"
    write_of_two_sizes(source)
    asked: list[tuple[int, float]] = []

    class Listening(FakeEngine):
        def step(self, state: FakeState, controls: Controls, source_THWC: np.ndarray | None = None) -> Chunk:
            assert source_THWC is not None
            asked.append((controls.source, float(source_THWC[-1].mean())))
            return super().step(state, controls, source_THWC)

    generate(Listening, Controls("a red ball", strength=0.0), None, out, clip=source)

    assert [number for number, _ in asked] == [0, 1, 1]
    assert asked[0][1] < 80 and asked[1][1] > 160


class Holding(FakeEngine):
    """From the fourth chunk on the left of its two tiles is computed alone."""

    def step(self, state: FakeState, controls: Controls, source_THWC: np.ndarray | None = None) -> Chunk:
        chunk = super().step(state, controls, source_THWC)
        return replace(chunk, active_HW=None if chunk.index < 3 else np.array([[True, False]]))


def test_computed_tiles_are_tinted_where_that_is_asked_for(tmp_path: Path) -> None:
    """Blue is in the tint, and hardly in what is drawn."""
    for name, show in (("plain", False), ("shown", True)):
        controls, path = Controls("a red ball", seed=20, regions=0.5), tmp_path / f"{name}.mp4"
        generate(Holding, controls, 1.5, path, show_tiles=show)
    plain, shown = (
        np.stack(list(read_clip(tmp_path / f"{name}.mp4", CONFIG.fps, WIDTH, HEIGHT))).astype(int)[..., 2]
        for name in ("plain", "shown")
    )
    more = shown[14:] - plain[14:]
    assert more[:, :, :24].mean() > 40
    assert abs(more[:, :, 40:].mean()) < 10


@pytest.mark.parametrize(
    ("regions", "words"),
    [
        (0.0, r"$"),
        (0.5, r"Computed: 75 % of the tiles, \d+ ms a chunk\. A sparse chunk takes \d+ % (less|more) time than a "),
    ],
)
def test_what_the_dial_did_is_told_in_a_sentence(tmp_path: Path, regions: float, words: str) -> None:
    written = generate(Holding, Controls("a red ball", regions=regions), 1.5, tmp_path / "clip.mp4")

    assert re.match(words, written.regions)
    assert written.unknown_words == ()


def test_what_is_saved_is_not_told_before_it_is_known(tmp_path: Path) -> None:
    written = generate(load_fake, Controls("a red ball", regions=0.5), 1.5, tmp_path / "clip.mp4")

    assert re.fullmatch(r"Computed: 100 % of the tiles, \d+ ms a chunk\.", written.regions)


def test_a_dial_for_a_model_that_cannot_hold_tiles_is_answered_in_a_sentence_and_nothing_is_tinted(
    tmp_path: Path,
) -> None:
    class Narrow(FakeEngine):
        config = replace(CONFIG, width=80, height=48, student=replace(CONFIG.student, patch_size=(1, 1, 1)))

    for regions, words in ((0.0, ""), (0.5, f"{DENSE_ONLY.message} {DENSE_ONLY.remedy}")):
        controls, path = Controls("a green ball", regions=regions), tmp_path / "clip.mp4"
        written = generate(Narrow, controls, 0.5, path, show_tiles=True)
        assert written.regions == words
    assert np.stack(list(read_clip(tmp_path / "clip.mp4", CONFIG.fps, WIDTH, HEIGHT)))[..., 2].mean() < 60
