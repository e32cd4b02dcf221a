"""The user's own clips: a folder of videos with captions becomes pictures of the model's size and rate, once, on disk.

Captions are text files beside the videos (`cat.mp4`, `cat.txt`) or a table `captions.csv` with the columns `file` and
`caption`. What cannot be read is skipped and listed. Knows nothing of latents or models.
"""

import csv
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.config import ModelConfig
from pipeline.errors import PipelineError
from pipeline.text import words

SUFFIXES = frozenset((".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".webp", ".gif"))
TABLE = "captions.csv"
MOST_WORDS = 2000
MOST_EXAMPLES, MOST_LETTERS = 6, 120


@dataclass(frozen=True)
class Captioned:
    path: Path
    caption: str


@dataclass
class Footage:
    """Pictures ready to cut from. takes: uint8 (T, H, W, 3) on disk, each with its caption. skipped: file -> why."""

    takes: list[NDArray[np.uint8]] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def cut(self, rng: np.random.Generator, frames: int) -> tuple[NDArray[np.uint8], str]:
        """`frames` pictures in a row from anywhere in it; long takes are cut from more often."""
        places = np.array([len(take) - frames + 1 for take in self.takes]).clip(0).cumsum()
        place = int(rng.integers(places[-1]))
        index = int(np.searchsorted(places, place, side="right"))
        start = place - (int(places[index - 1]) if index else 0)
        return np.asarray(self.takes[index][start : start + frames]), self.captions[index]

    def words(self) -> tuple[str, ...]:
        """The vocabulary of the captions, the most frequent words of it, in order."""
        counted = Counter(word for caption in self.captions for word in words(caption))
        return tuple(sorted(word for word, _ in counted.most_common(MOST_WORDS)))

    def examples(self) -> tuple[str, ...]:
        """A few captions to offer as prompts."""
        return tuple(dict.fromkeys(caption[:MOST_LETTERS] for caption in self.captions))[:MOST_EXAMPLES]


def told(footage: Footage) -> str:
    """What was taken in and what was not, for a person."""
    lines = [f"{len(footage.takes)} clips taken in, {len(footage.skipped)} skipped."]
    return "\n".join([*lines, *(f"  {name}: {why}" for name, why in sorted(footage.skipped.items()))])


def find_clips(folder: Path) -> tuple[list[Captioned], dict[str, str]]:
    """Videos with their captions, and what is skipped with the reason.

    Raises PipelineError: `data_empty`, `captions_missing`, `captions_without_clips`, `captions_invalid`.
    """
    if not folder.is_dir():
        raise PipelineError("data_empty", f"There is no folder {folder}.", "Name the folder that holds your clips.")
    videos = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    table = folder / TABLE
    said = _table(table) if table.is_file() else _beside(folder)
    remedy = f"Put clips there: {', '.join(sorted(SUFFIXES))}."
    if not videos and said:
        raise PipelineError("captions_without_clips", f"{folder} holds captions and no video.", remedy)
    if not videos:
        raise PipelineError("data_empty", f"{folder} holds no video.", remedy)
    names = {path.name for path in videos}
    skipped = {name: "its caption has no clip" for name in said if name not in names}
    skipped |= {name: "it has no caption" for name in sorted(names) if not said.get(name)}
    found = [Captioned(path, said[path.name]) for path in videos if said.get(path.name)]
    if not found:
        raise PipelineError(
            "captions_missing",
            f"None of the {len(videos)} clips in {folder} has a caption.",
            f"Write one beside each, as cat.txt for cat.mp4, or all in {TABLE}.",
        )
    return found, skipped


def _beside(folder: Path) -> dict[str, str]:
    """Captions by the name of the video that they stand beside, or by their own name where there is none."""
    said = {}
    for text in sorted(folder.glob("*.txt")):
        videos = [path for path in folder.glob(f"{text.stem}.*") if path.suffix.lower() in SUFFIXES]
        for name in [path.name for path in videos] or [text.name]:
            said[name] = " ".join(text.read_text(errors="replace").split())
    return said


def _table(path: Path) -> dict[str, str]:
    try:
        with path.open(newline="") as file:
            rows = csv.DictReader(file)
            if not {"file", "caption"} <= set(rows.fieldnames or ()):
                raise PipelineError(
                    "captions_invalid", f"{path} lacks a column.", "Its first line has to name `file` and `caption`."
                )
            return {row["file"] or "": (row["caption"] or "").strip() for row in rows}
    except (UnicodeDecodeError, csv.Error) as error:
        raise PipelineError("captions_invalid", f"{path} is not a table: {error}.", "Save it as CSV.") from error


def take_in(folder: Path, out: Path, config: ModelConfig, shortest: int) -> Footage:
    """Decode every clip to `out`, one .npy each; those that are there already are kept.

    shortest: pictures that a clip must have to be cut from.

    Raises what `find_clips` raises, and `data_empty` when no clip could be used.
    """
    found, skipped = find_clips(folder)
    out.mkdir(parents=True, exist_ok=True)
    footage = Footage(skipped=skipped)
    for clip in found:
        path = out / f"{clip.path.name}.npy"
        if not path.is_file():
            try:
                taken = list(pictures(clip.path, config.fps, config.width, config.height))
            except (OSError, av.error.FFmpegError) as error:
                skipped[clip.path.name] = (error.strerror or "it cannot be decoded").lower()
                continue
            if len(taken) < shortest:
                skipped[clip.path.name] = f"it has {len(taken)} of {shortest} pictures at {config.fps} a second"
                continue
            part = path.with_suffix(".part")
            with part.open("wb") as file:
                np.save(file, np.stack(taken))
            part.replace(path)
        footage.takes.append(np.load(path, mmap_mode="r"))
        footage.captions.append(clip.caption)
    (out / "skipped.json").write_text(json.dumps(skipped, indent=2) + "\n")
    if not footage.takes:
        raise PipelineError(
            "data_empty", f"None of the clips in {folder} can be used.", f"{out / 'skipped.json'} says why."
        )
    return footage


def pictures(path: Path, fps: int, width: int, height: int) -> Iterator[NDArray[np.uint8]]:
    """The clip at this rate, cropped to the shape and resized; a slow clip repeats pictures, a fast one drops some."""
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise OSError(0, "it holds no video")
        period, due_s = Fraction(1, fps), Fraction(0)
        first_s: Fraction | None = None
        for frame in container.decode(video=0):
            now_s = Fraction(frame.pts or 0) * frame.time_base
            first_s = now_s if first_s is None else first_s
            while due_s <= now_s - first_s + period / 2:
                yield _fitted(frame.to_ndarray(format="rgb24"), width, height)
                due_s += period


def _fitted(picture: NDArray[np.uint8], width: int, height: int) -> NDArray[np.uint8]:
    rows, columns = picture.shape[:2]
    scale = max(height / rows, width / columns)
    size = (max(width, round(columns * scale)), max(height, round(rows * scale)))
    resized = cv2.resize(picture, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    top, left = (size[1] - height) // 2, (size[0] - width) // 2
    return np.asarray(resized[top : top + height, left : left + width], np.uint8)
