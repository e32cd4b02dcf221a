"""What a model reaches far down a stream and after a change of its prompt. Knows no clock, as `evaluate` knows none."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.chunk import Controls
from pipeline.config import ModelConfig
from pipeline.engine import Engine
from pipeline.plan import Plan
from pipeline.state import StreamState
from pipeline.training.asks import Ask, Switch
from pipeline.training.evaluate import (
    CLIP_FRAMES,
    SETTLED_CHUNKS,
    Drawn,
    Made,
    Model,
    Pictures,
    Quality,
    Reader,
    Spread,
    clip_chunks,
    one_by_one,
    picture,
    quality,
    rendered,
    renders,
)
from pipeline.training.probe_clips import FRAMES, shrink, view

DRIFT_FRAMES = (0, 256, 1000, 4000, 20000)
SWITCHED_CHUNKS = 2


@dataclass(frozen=True)
class DriftPoint:
    """quality: from a clip that begins at this frame of each stream; None where no stream was taken so far.

    streams: that were taken so far. opening: the score of these same streams where they begin.
    """

    frame: int
    quality: Quality | None = None
    streams: int = 0
    opening: float | None = None


@dataclass(frozen=True)
class Drift:
    """strips: for each stream, one small picture a measured frame; white where it was not taken so far."""

    points: list[DriftPoint]
    strips: list[list[Pictures]]


@dataclass(frozen=True)
class Switched:
    """rate: share of the changes after which everything that changed is seen. ceiling: of renders of the new scene.

    strips: for each change, small pictures of the last chunk before and of the two after it.
    """

    rate: float
    ceiling: float
    strips: list[list[Pictures]]


class Glanced(Engine):
    """A student that draws pictures only of the chunks that are looked at, and none of the others.

    A stream goes on from its latents, so what it shows is the same; two fifths of the time are spared.
    """

    def __init__(self, engine: Engine, chunks: Collection[int]) -> None:
        super().__init__(engine.config, engine.codec, engine.text, engine.student, device=str(engine.device))
        self.drawn = {*chunks, *(index - 1 for index in chunks)}  # the decoder reads the latent frame before

    def _decode(self, state: StreamState, clean: Tensor, plan: Plan | None) -> tuple[Tensor, Tensor]:
        if plan is not None or state.index in self.drawn:
            return super()._decode(state, clean, plan)
        return clean, torch.empty(0, 3, self.config.height, self.config.width, dtype=torch.uint8)


def glanced(engine: Engine, until: int) -> Glanced:
    """For streams that `measure_drift` takes up to this frame."""
    chunks = clip_chunks(engine.config)
    return Glanced(engine, {start + n for start in _starts(engine.config, until).values() for n in range(chunks)})


def _starts(config: ModelConfig, until: int) -> dict[int, int]:
    """The chunk that holds each of DRIFT_FRAMES: a clip begins there."""
    return {frame: frame // config.frames_per_chunk for frame in DRIFT_FRAMES if frame <= until}


def measure_drift(
    model: Model, probe: Reader, asked: Sequence[Ask], untils: Sequence[int], *, spread: Spread = one_by_one
) -> Drift:
    """Long streams, looked at at DRIFT_FRAMES. untils: the latest frame that each stream is looked at."""
    config, chunks = model.config, clip_chunks(model.config)
    lengths = [max(_starts(config, until).values()) + chunks for until in untils]

    def follow(wanted: tuple[Ask, int, int], made: Made) -> dict[int, Tensor]:
        ask, until, length = wanted
        state, starts = model.open(ask.seed), _starts(config, until)
        parts: dict[int, list[Pictures]] = {frame: [] for frame in starts}
        for index in range(length):
            frames_THWC = model.step(state, Controls(ask.prompt, ask.seed)).frames_THWC
            for frame, start in starts.items():
                if start <= index < start + chunks:
                    parts[frame].append(frames_THWC)
            made()
        return {frame: view(np.concatenate(seen)[:CLIP_FRAMES]) for frame, seen in parts.items()}

    streams = spread(follow, list(zip(asked, untils, lengths, strict=True)), sum(lengths), "drift")

    def read(frame: int, taken: Sequence[int]) -> Quality:
        start_s = _starts(config, frame)[frame] * config.frames_per_chunk / config.fps
        clips, scenes = torch.stack([streams[number][frame] for number in taken]), [asked[number] for number in taken]
        drawn, real = Drawn(clips, probe.read(clips), []), renders(config, probe, scenes, start_s)
        return quality(drawn, real, scenes, config, start_s)

    points = []
    for frame in DRIFT_FRAMES:
        taken = [number for number, seen in enumerate(streams) if frame in seen]
        point = DriftPoint(frame)
        if taken:
            point = DriftPoint(frame, read(frame, taken), len(taken), read(0, taken).score)
        points.append(point)
    blank = np.full_like(picture(streams[0][0][0]), 255)
    shown = [point.frame for point in points if point.streams]
    strips = [[picture(seen[frame][0]) if frame in seen else blank for frame in shown] for seen in streams]
    return Drift(points, strips)


def measure_switches(
    model: Model, probe: Reader, switches: Sequence[Switch], *, spread: Spread = one_by_one
) -> Switched:
    """Streams whose prompt changes; the probe reads the newest eight pictures of the second chunk under the new one."""
    config, chunks = model.config, SETTLED_CHUNKS + SWITCHED_CHUNKS

    def change(wanted: Switch, made: Made) -> Pictures:
        state, parts = model.open(wanted.before.seed), []
        for index in range(chunks):
            ask = wanted.before if index < SETTLED_CHUNKS else wanted.after
            parts.append(model.step(state, Controls(ask.prompt, ask.seed)).frames_THWC)
            made()
        return np.concatenate(parts)

    clips = spread(change, switches, chunks * len(switches), "prompt switches")
    # The mover goes on where it was: the new scene at the same time of the stream.
    times_s = (np.arange(chunks * config.frames_per_chunk) / config.fps)[-FRAMES:]
    seen = torch.stack([view(frames_THWC[-FRAMES:], 1) for frames_THWC in clips])
    true = torch.stack([rendered(config, wanted.after, times_s) for wanted in switches])
    last = SWITCHED_CHUNKS * config.frames_per_chunk
    strips = [list(shrink(frames_THWC[-last - 1 :: max(1, last // 4)])) for frames_THWC in clips]
    rates = [_all_seen(probe.read(each).words, switches) for each in (seen, true)]
    return Switched(rates[0], rates[1], strips)


def _all_seen(read: Sequence[dict[str, str]], switches: Sequence[Switch]) -> float:
    """Only what the new prompt says has to be seen."""
    hits = [
        all(words[name] == word for name, word in change.words.items())
        for words, change in zip(read, switches, strict=True)
    ]
    return float(np.mean(hits))
