"""`stillstream generate`: the same engine as the server's, in this process, into a file. Knows no network."""

from collections.abc import Callable, Iterator
from itertools import count, islice
from pathlib import Path

import numpy as np

from app.clip import read_clip, read_picture, replacing, write_clip
from app.mailbox import opening
from app.stopwatch import Stopwatch
from app.worker import EngineFactory, unknown_words
from pipeline.chunk import Controls
from pipeline.config import ModelConfig

DEFAULT_S, LONGEST_S = 5.0, 3600.0


def generate(
    load: EngineFactory,
    controls: Controls,
    seconds: float | None,
    out: Path,
    *,
    clip: Path | None = None,
    image: Path | None = None,
    latents: Path | None = None,
    on_start: Callable[[int | None], None] = lambda frames: None,
    on_chunk: Callable[[int], None] = lambda frames: None,
) -> tuple[str, ...]:
    """Write a clip; returns the words of its prompt that the model does not know.

    seconds: None is as long as the clip, or DEFAULT_S without one. clip: the video to follow; the new one ends with it
    at the latest. image: a picture to begin with. latents: also keep what was decoded. on_start hears the number of
    frames to come, None where only the clip's end will tell; on_chunk that of each chunk.
    """
    engine = load(Stopwatch().trace)
    config = engine.config
    state = engine.open(controls.seed)
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
            chunk = engine.step(state, *order)
            frames_THWC = chunk.frames_THWC[:left]
            writer.write(frames_THWC)
            if latents is not None:
                kept_TCHW.append(chunk.latents_TCHW)
            left -= len(frames_THWC)
            on_chunk(len(frames_THWC))
    if latents is not None:
        _write_latents(latents, np.concatenate(kept_TCHW))
    return unknown_words(engine, controls.prompt)


def _orders(
    config: ModelConfig, controls: Controls, clip: Path | None, image: Path | None
) -> Iterator[tuple[Controls, np.ndarray | None]]:
    """What to draw and what to follow, chunk by chunk: the picture standing still, then the clip, or nothing for ever.

    The last chunk of a clip rests on its last picture.
    """
    indices = count()
    if image is not None:
        picture_HWC = read_picture(image, config.width, config.height)
        order = opening(controls, np.repeat(picture_HWC[None], config.pictures(next(indices)), 0))
        yield order.controls, order.source_THWC
    pictures = None if clip is None else read_clip(clip, config.fps, config.width, config.height)
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
