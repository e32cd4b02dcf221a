"""`stillstream generate`: the same engine as the server's, in this process, into a file. Knows no network."""

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from app.clip import read_clip, replacing, write_clip
from app.stopwatch import Stopwatch
from app.worker import EngineFactory, EngineLike, unknown_words
from pipeline.chunk import Controls

DEFAULT_S, LONGEST_S = 5.0, 3600.0


def generate(
    load: EngineFactory,
    controls: Controls,
    seconds: float | None,
    out: Path,
    *,
    clip: Path | None = None,
    latents: Path | None = None,
    on_start: Callable[[int | None], None] = lambda frames: None,
    on_chunk: Callable[[int], None] = lambda frames: None,
) -> tuple[str, ...]:
    """Write a clip; returns the words of its prompt that the model does not know.

    seconds: None is as long as the clip, or DEFAULT_S without one.
    clip: the video to follow; the new one ends with it at the latest. latents: also keep what was decoded.
    on_start hears the number of frames to come, None where only the clip's end will tell; on_chunk that of each chunk.
    """
    engine = load(Stopwatch().trace)
    config = engine.config
    sources = _sources(engine, clip) if clip is not None else None
    state = engine.open(controls.seed)
    kept_TCHW: list[np.ndarray] = []
    if seconds is None:
        seconds = LONGEST_S if clip is not None else DEFAULT_S
    left = max(1, round(seconds * config.fps))
    on_start(None if clip is not None else left)
    with write_clip(out, config.fps) as writer:
        while left > 0:
            source_THWC = next(sources, None) if sources is not None else None
            if sources is not None and source_THWC is None:
                break
            chunk = engine.step(state, controls, source_THWC)
            frames_THWC = chunk.frames_THWC[:left]
            writer.write(frames_THWC)
            if latents is not None:
                kept_TCHW.append(chunk.latents_TCHW)
            left -= len(frames_THWC)
            on_chunk(len(frames_THWC))
    if latents is not None:
        _write_latents(latents, np.concatenate(kept_TCHW))
    return unknown_words(engine, controls.prompt)


def _sources(engine: EngineLike, clip: Path) -> Iterator[np.ndarray]:
    """The clip in chunks; the last one rests on the clip's last picture."""
    config = engine.config
    pictures = read_clip(clip, config.fps, config.width, config.height)
    while window := list(islice(pictures, config.frames_per_chunk)):
        window += [window[-1]] * (config.frames_per_chunk - len(window))
        yield np.stack(window)


def _write_latents(path: Path, latents_TCHW: np.ndarray) -> None:
    from safetensors.numpy import save_file

    with replacing(path) as part:
        save_file({"latents_TCHW": np.ascontiguousarray(latents_TCHW)}, part)
