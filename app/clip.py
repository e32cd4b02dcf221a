"""Video files in and out: any clip that FFmpeg reads becomes frames, frames become a clip.

A clip is written beside its place and renamed when it is whole, so a half-written file is never left.
Knows no model.
"""

import errno
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from safetensors import SafetensorError

from app.errors import AppError
from pipeline.errors import ran_full
from streaming.frames import fit

FORMATS = {".mp4": "libx264", ".webm": "libvpx-vp9", ".webp": "libwebp_anim"}
QUALITY = {
    "libx264": {"crf": "18", "preset": "medium"},
    "libvpx-vp9": {"crf": "30", "b": "0"},
    "libwebp_anim": {"quality": "80"},
}
OPTIONS = {"libx264": {"movflags": "+faststart"}, "libwebp_anim": {"loop": "0"}}


class ClipWriter:
    """Takes frames of one size; use as `with ClipWriter(...) as clip`."""

    def __init__(self, container: av.container.OutputContainer, codec: str, fps: int) -> None:
        self._container = container
        self._stream = container.add_stream(codec, rate=fps, options=QUALITY[codec])
        self._stream.pix_fmt = "yuv420p"

    def write(self, frames_THWC: np.ndarray) -> None:
        if not self._stream.codec_context.is_open:
            self._stream.height, self._stream.width = frames_THWC.shape[1:3]
        for frame_HWC in frames_THWC:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame_HWC), format="rgb24")
            self._container.mux(self._stream.encode(picture))

    def finish(self) -> None:
        self._container.mux(self._stream.encode(None))


@contextmanager
def write_clip(path: Path, fps: int) -> Iterator[ClipWriter]:
    """Raises AppError: `out_unwritable`, `disk_full`."""
    codec = _codec(path)
    with replacing(path) as part, av.open(str(part), "w", options=OPTIONS.get(codec, {})) as container:
        writer = ClipWriter(container, codec, fps)
        yield writer
        writer.finish()


def _codec(path: Path) -> str:
    if path.suffix.lower() not in FORMATS:
        known = ", ".join(FORMATS)
        raise AppError("out_unwritable", f"{path.name} is not a kind of clip that can be written.", f"Use {known}.")
    return FORMATS[path.suffix.lower()]


def check_clip_place(path: Path) -> None:
    """Whether a clip can be written there, told before there is one. Raises AppError: `out_unwritable`, `disk_full`."""
    _codec(path)
    check_place(path)


def check_place(path: Path) -> None:
    """The same of any file. Raises AppError: `out_unwritable`, `disk_full`."""
    _beside(path).unlink()


def _beside(path: Path) -> Path:
    """A new empty file in path's folder."""
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    except OSError as error:
        raise _unwritable(path, error) from error
    os.close(handle)
    return Path(name)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write in path's folder; it takes path's place when the block ends well and is gone otherwise.

    Raises AppError: `out_unwritable`, `disk_full`.
    """
    part = _beside(path)
    try:
        yield part
        part.chmod(0o666 & ~_umask())
        part.replace(path)
    except (OSError, SafetensorError) as error:
        raise _unwritable(path, error) from error
    finally:
        with suppress(FileNotFoundError):
            part.unlink()


def read_clip(
    path: Path, fps: int, width: int, height: int, on_resized: Callable[[], None] = lambda: None
) -> Iterator[np.ndarray]:
    """The clip's pictures at this rate and size, one (height, width, 3) after the other.

    on_resized: called where they change the size that they come in, before the first of them.
    Raises AppError (`clip_unreadable`).
    """
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise _unreadable(path, "it holds no video")
            period = Fraction(1, fps)
            due_s: Fraction | None = None
            raw_size: tuple[int, int] | None = None
            for frame in container.decode(video=0):
                now_s = Fraction(frame.pts or 0) * frame.time_base
                due_s = now_s if due_s is None else due_s
                if now_s + period / 2 < due_s:
                    continue  # the clip is faster than we are
                if raw_size not in (None, (frame.width, frame.height)):
                    on_resized()
                raw_size = (frame.width, frame.height)
                picture_HWC = fit(frame.to_ndarray(format="rgb24"), width, height)
                while due_s <= now_s + period / 2:
                    yield picture_HWC
                    due_s += period
            if due_s is None:
                raise _unreadable(path, "it holds no picture")
    except (OSError, av.error.FFmpegError) as error:
        raise _unreadable(path, (error.strerror or "unknown data").lower()) from error


def read_picture(path: Path, width: int, height: int) -> np.ndarray:
    """The first picture of an image or clip at this size, (height, width, 3). Raises AppError (`clip_unreadable`)."""
    return next(iter(read_clip(path, 1, width, height)))


def check_source(path: Path) -> None:
    """Whether a clip or a picture can be read, by its first picture. Raises AppError (`clip_unreadable`)."""
    read_picture(path, 16, 16)


def _unreadable(path: Path, why: str) -> AppError:
    return AppError(
        "clip_unreadable",
        f"{path} cannot be read as a video or a picture: {why}.",
        "Name a file such as an mp4 or a png.",
    )


def _unwritable(path: Path, error: OSError | SafetensorError) -> AppError:
    if ran_full(error):
        return AppError(
            "disk_full", f"There is no room for {path}; it was not kept.", "Make room, or name a file on another disk."
        )
    why = ((error.strerror if isinstance(error, OSError) else None) or str(error)).lower()
    return AppError("out_unwritable", f"{path} cannot be written: {why}.", "Name a file in a folder you may write to.")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
