"""`stillstream generate`: the same engine as the server's, in this process, into a file. Knows no network."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import count, islice
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np

from app.clip import check_clip_place, check_place, check_source, read_clip, read_picture, replacing, write_clip
from app.errors import DENSE_ONLY
from app.mailbox import opening
from app.savings import Savings
from app.stopwatch import Stopwatch
from app.tint import tinted
from app.worker import EngineFactory, unknown_words
from pipeline.chunk import Chunk, Controls
from pipeline.config import ModelConfig

DEFAULT_S, LONGEST_S = 5.0, 3600.0


@dataclass(frozen=True)
class Written:
    """What there is to say of a clip.

    unknown_words: of its prompt, that the model does not know. regions: what the dial did, in a sentence or two; empty
    where it is off.
    """

    unknown_words: tuple[str, ...]
    regions: str = ""


@dataclass
class Meter:
    """Times and computed tiles of a clip's chunks."""

    savings: Savings = field(default_factory=Savings)
    chunk_ms: list[float] = field(default_factory=list)
    active: list[float] = field(default_factory=list)

    def took(self, controls: Controls, followed: bool, chunk: Chunk, chunk_ms: float) -> None:
        self.savings.took(controls, followed, chunk, chunk_ms)
        self.chunk_ms.append(chunk_ms)
        self.active.append(1.0 if chunk.active_HW is None else float(chunk.active_HW.mean()))

    def told(self) -> str:
        """In words; of what is saved nothing until it is known."""
        words = f"Computed: {100 * sum(self.active) / len(self.active):.0f} % of the tiles, "
        words += f"{median(self.chunk_ms):.0f} ms a chunk."
        share = self.savings.share
        if share is not None:
            less = "less" if share >= 0 else "more"
            words += f" A sparse chunk takes {abs(100 * share):.0f} % {less} time than a dense one."
        return words


def generate(
    load: EngineFactory,
    controls: Controls,
    seconds: float | None,
    out: Path,
    *,
    clip: Path | None = None,
    image: Path | None = None,
    latents: Path | None = None,
    show_tiles: bool = False,
    on_start: Callable[[int | None], None] = lambda frames: None,
    on_chunk: Callable[[int], None] = lambda frames: None,
) -> Written:
    """Write a clip.

    seconds: None is as long as the clip, or DEFAULT_S without one. clip: the video to follow; the new one ends with it
    at the latest. image: a picture to begin with. latents: also keep what was decoded. show_tiles: tint those that were
    computed, of a model that can hold any. on_start hears the number of frames to come, None where only the clip's end
    will tell; on_chunk that of each chunk. What is to be read and where is to be written is looked at first.
    """
    for source in (clip, image):
        if source is not None:
            check_source(source)
    check_clip_place(out)
    if latents is not None:
        check_place(latents)
    engine = load(Stopwatch().trace)
    config = engine.config
    state, meter = engine.open(controls.seed), Meter()
    kept_TCHW: list[np.ndarray] = []
    if seconds is None:
        seconds = LONGEST_S if clip is not None else DEFAULT_S
    left = max(1, round(seconds * config.fps))
    on_start(None if clip is not None else left)
    orders = _orders(config, controls, clip, image)
    with write_clip(out, config.fps) as writer:
        while left > 0:
            order = next(orders, None)
            if order is None:
                break
            started_s = perf_counter()
            chunk = engine.step(state, *order)
            meter.took(order[0], order[1] is not None, chunk, (perf_counter() - started_s) * 1000)
            shown_THWC = tinted(chunk) if show_tiles and config.tiles else chunk.frames_THWC
            frames_THWC = shown_THWC[:left]
            writer.write(frames_THWC)
            if latents is not None:
                kept_TCHW.append(chunk.latents_TCHW)
            left -= len(frames_THWC)
            on_chunk(len(frames_THWC))
    if latents is not None:
        _write_latents(latents, np.concatenate(kept_TCHW))
    told = ""
    if controls.regions:
        told = meter.told() if config.tiles else f"{DENSE_ONLY.message} {DENSE_ONLY.remedy}"
    return Written(unknown_words(engine, controls.prompt), told)


def _orders(
    config: ModelConfig, controls: Controls, clip: Path | None, image: Path | None
) -> Iterator[tuple[Controls, np.ndarray | None]]:
    """What to draw and what to follow, chunk by chunk: the picture standing still, then the clip, or nothing for ever.

    The last chunk of a clip rests on its last picture. Where the clip changes its size, another source begins.
    """
    indices = count()
    if image is not None:
        picture_HWC = read_picture(image, config.width, config.height)
        order = opening(controls, np.repeat(picture_HWC[None], config.pictures(next(indices)), 0))
        yield order.controls, order.source_THWC

    def resized() -> None:
        nonlocal controls
        controls = replace(controls, source=controls.source + 1)

    pictures = None if clip is None else read_clip(clip, config.fps, config.width, config.height, resized)
    for index in indices:
        if pictures is None:
            yield controls, None
            continue
        wanted = config.pictures(index)
        window = list(islice(pictures, wanted))
        if not window:
            return
        yield controls, np.stack(window + [window[-1]] * (wanted - len(window)))


def _write_latents(path: Path, latents_TCHW: np.ndarray) -> None:
    from safetensors.numpy import save_file

    with replacing(path) as part:
        save_file({"latents_TCHW": np.ascontiguousarray(latents_TCHW)}, part)
