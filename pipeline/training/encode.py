"""The user's own clips become what a Wan run trains on: latents and prompt embeddings on disk, as `precomputed` reads.

Every video is cut into clips of one length, one after the other; what is left over at its end is dropped.
`encoded.json` tells what is done, so the same command goes on where it was stopped, and a video whose caption or file
changed is encoded anew. Which autoencoder and text encoder do the work is the caller's business.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import av
import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import Progress
from safetensors import SafetensorError
from torch import Tensor

from pipeline.codec import pixels_to_frames
from pipeline.errors import PipelineError
from pipeline.training.footage import Captioned, find_clips, pictures
from pipeline.training.loop import disk_full, is_full
from pipeline.training.precomputed import UNPROMPTED, write_clip, write_unprompted

RECORD = "encoded.json"
FRAMES = 4  # pictures of a latent frame; a clip's first one has a single picture

Embed = Callable[[Sequence[str]], Tensor]
"""Prompts -> embeddings (B, L, C); places after a prompt's last one are zero."""


class VideoCodec(Protocol):
    """What is asked of `pipeline.wan_codec.WanCodec`."""

    def remember(self) -> Any: ...
    def encode_push(self, memory: Any, frames_TCHW: Tensor) -> Tensor | None: ...


@dataclass(frozen=True)
class Shape:
    """Of every clip. latents: latent frames; the first stands for one picture, the others for four each. model: a name
    for what encodes, so that clips of two models are not mixed."""

    width: int = 832
    height: int = 480
    fps: int = 16
    latents: int = 21
    model: str = ""

    @property
    def frames(self) -> int:
        return 1 + FRAMES * (self.latents - 1)


@dataclass
class Record:
    """What is done. done: video -> its caption, its size in bytes, how many clips it gave and what broke it off.
    skipped: file -> why."""

    shape: dict[str, Any]
    done: dict[str, dict[str, Any]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def clips(self) -> int:
        return sum(video["clips"] for video in self.done.values())

    def told(self) -> str:
        lines = [f"{self.clips} clips of {len(self.done)} videos encoded, {len(self.skipped)} files skipped."]
        return "\n".join([*lines, *(f"  {name}: {why}" for name, why in sorted(self.skipped.items()))])


def encode(
    folder: Path, out: Path, shape: Shape, codec: VideoCodec, embed: Embed, *, device: str = "cpu", show: bool = True
) -> Record:
    """Encode all videos of a folder that have captions; returns what is there then.

    Raises PipelineError: `data_of_another_kind`, `disk_full`, `data_empty`, and what `footage.find_clips` raises.
    """
    found, skipped = find_clips(folder)
    out.mkdir(parents=True, exist_ok=True)
    record = _recorded(out, shape)
    record.skipped = skipped
    if not (out / UNPROMPTED).is_file():
        text_1LC = _trimmed(embed([""]))
        _whole(out / UNPROMPTED, lambda path: write_unprompted(path, text_1LC))
    with Progress(disable=not show) as progress:
        for clip in progress.track(found, description="encode"):
            name = clip.path.name
            known = {"caption": clip.caption, "bytes": clip.path.stat().st_size}
            before = record.done.pop(name, None)
            if before is not None and {key: before[key] for key in known} == known:
                record.done[name] = before
                skipped |= {name: before["damage"]} if before["damage"] else {}
                continue
            for old in out.glob(f"{_escaped(name)}-*.safetensors"):
                old.unlink()
            count, why = _video(clip, out, shape, codec, embed, device)
            if why:
                skipped[name] = why
            if count:
                record.done[name] = {**known, "clips": count, "damage": why}
            _keep(out, record)
    _keep(out, record)
    if not record.done:
        raise PipelineError(
            "data_empty", f"None of the clips in {folder} can be used.", f"{out / RECORD} says why, file by file."
        )
    return record


@torch.inference_mode()
def _video(
    clip: Captioned, out: Path, shape: Shape, codec: VideoCodec, embed: Embed, device: str
) -> tuple[int, str | None]:
    """How many clips a video gave, and what is wrong with it. What came whole before a damage is kept."""
    count, part, text_1LC = 0, list[NDArray[np.uint8]](), None
    try:
        for picture in pictures(clip.path, shape.fps, shape.width, shape.height):
            part.append(picture)
            if len(part) == shape.frames:
                text_1LC = _trimmed(embed([clip.caption])) if text_1LC is None else text_1LC
                frames = pixels_to_frames(torch.from_numpy(np.stack(part)).to(device))
                latents = codec.encode_push(codec.remember(), frames)
                assert latents is not None and len(latents) == shape.latents, "a clip fills its latent frames"
                if not latents.isfinite().all():
                    return count, "its latents are not finite"
                _clip(out / f"{clip.path.name}-{count:04}.safetensors", latents, text_1LC)
                count, part = count + 1, []
    except (OSError, av.error.FFmpegError) as error:
        return count, (error.strerror or "it cannot be decoded").lower()
    if count:
        return count, None
    return 0, f"it has {len(part)} of {shape.frames} pictures at {shape.fps} a second"


def _clip(path: Path, latents_TCHW: Tensor, text_1LC: Tensor) -> None:
    _whole(path, lambda part: write_clip(part, latents_TCHW.half().cpu(), text_1LC))


def _trimmed(text_1LC: Tensor) -> Tensor:
    """Without the empty places at the end, in bfloat16: the range of the encoder's values, and small."""
    used = text_1LC[0].abs().amax(1).nonzero()
    length = int(used.max()) + 1 if len(used) else 1
    return text_1LC[:, :length].to("cpu", torch.bfloat16)


def _whole(path: Path, write: Callable[[Path], None]) -> None:
    """The file is there whole or not at all. Raises PipelineError `disk_full`."""
    part = path.with_name(f"{path.name}.part")
    try:
        write(part)
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        if is_full(error, path.parent):
            raise disk_full(f"all that was encoded before {path.name} is kept", "encoding") from error
        raise


def _keep(out: Path, record: Record) -> None:
    _whole(out / RECORD, lambda path: _write(path, record))


def _write(path: Path, record: Record) -> None:
    path.write_text(json.dumps(asdict(record), indent=2, sort_keys=True) + "\n")


def _recorded(out: Path, shape: Shape) -> Record:
    path = out / RECORD
    if not path.is_file():
        return Record(asdict(shape))
    record = Record(**json.loads(path.read_text()))
    if record.shape != asdict(shape):
        differs = [name for name, value in asdict(shape).items() if record.shape.get(name) != value]
        raise PipelineError(
            "data_of_another_kind",
            f"{out} holds clips of another {', '.join(differs)}.",
            "Name another folder for these, or give what those were encoded with.",
        )
    return record


def _escaped(name: str) -> str:
    """For a pattern of files."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
