"""What a model reaches: it is asked for clips, a probe reads them, and renders of the same scenes stand beside.

A model is whatever opens streams and steps through them: a student at any number of steps, or the guided teacher.
Streams are made one after the other. Knows no clock: whoever wants times brings one. What the codec does alone is the
business of `evaluate_codec`.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.chunk import Chunk, Controls
from pipeline.config import ModelConfig
from pipeline.engine import Engine
from pipeline.training import world
from pipeline.training.asks import Ask, Switch
from pipeline.training.guided import with_steps
from pipeline.training.measures import (
    SCORED,
    agreement,
    frechet_distance,
    measure_motion,
    picture_change,
    score,
    still_share,
)
from pipeline.training.probe import Answers
from pipeline.training.probe_clips import FRAMES, STRIDE, shrink, view, view_times_s

STEP_COUNTS = (1, 2, 4, 8, 50)
DRIFT_FRAMES = (0, 256, 1000, 4000, 20000)
CLIP_FRAMES = FRAMES * STRIDE
SETTLED_CHUNKS, SWITCHED_CHUNKS = 4, 2

T = TypeVar("T")
Clock = Callable[[], float]
Pictures = NDArray[np.uint8]


class Model(Protocol):
    @property
    def config(self) -> ModelConfig: ...
    def open(self, seed: int) -> Any: ...
    def step(self, state: Any, controls: Controls, source_THWC: np.ndarray | None = None) -> Chunk: ...


class Reader(Protocol):
    """What is asked of the probe."""

    def read(self, clips_BTCHW: Tensor) -> Answers: ...


class Watch(Protocol):
    """Goes through the items and lets a person see how far it is."""

    def __call__(self, items: Sequence[T], text: str) -> Iterable[T]: ...


def unwatched(items: Sequence[T], text: str) -> Iterable[T]:
    return items


@dataclass(frozen=True)
class Drawn:
    """Clips of a model, or renders, as the probe takes them, and what it says of them.

    kept_THWC: the first clips at their full size.
    """

    clips_BTCHW: Tensor
    answers: Answers
    kept_THWC: list[Pictures]


@dataclass(frozen=True)
class Quality:
    """agreed: share of right words by attribute, of those asked for. motion_error: median, relative to the velocity
    asked for. still_share: of the clips that should move, those that do not. None: no clip was asked to move."""

    agreed: dict[str, float]
    motion_error: float | None
    still_share: float | None

    @property
    def score(self) -> float:
        """0 to 1. Subject and colour are always asked for; few clips may lack another attribute."""
        return score(self.agreed, [name for name in SCORED if name in self.agreed])


@dataclass(frozen=True)
class StepsRow:
    """quality: the score. ms: median time of a whole chunk."""

    steps: int
    quality: float
    ms: float


@dataclass(frozen=True)
class DriftPoint:
    """quality: from a clip that begins at this frame of each stream; None where no stream was taken so far."""

    frame: int
    quality: Quality | None


@dataclass(frozen=True)
class Drift:
    """strips: for each stream, one small picture a measured frame."""

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


def at_steps(engine: Engine, count: int) -> Engine:
    """The same weights in another number of passes."""
    return Engine(with_steps(engine.config, count), engine.codec, engine.text, engine.student)


def clip_chunks(config: ModelConfig) -> int:
    return math.ceil(CLIP_FRAMES / config.frames_per_chunk)


def draw(
    model: Model,
    probe: Reader,
    asked: Sequence[Ask],
    *,
    watch: Watch = unwatched,
    text: str = "",
    keep: int = 0,
) -> Drawn:
    """One stream an ask, from its opening, for as long as the probe looks at a clip."""
    views: list[Tensor] = []
    kept: list[Pictures] = []
    for ask in watch(asked, text):
        state, controls = model.open(ask.seed), Controls(ask.prompt, ask.seed)
        parts = [model.step(state, controls).frames_THWC for _ in range(clip_chunks(model.config))]
        frames_THWC = np.concatenate(parts)[:CLIP_FRAMES]
        views.append(view(frames_THWC))
        kept += [frames_THWC][: keep - len(kept)]
    clips = torch.stack(views)
    return Drawn(clips, probe.read(clips), kept)


def time_chunks(
    models: Sequence[Model], ask: Ask, clock_s: Clock, *, rounds: int = 5, watch: Watch = unwatched
) -> list[float]:
    """Median time of a whole chunk of each model, in ms. They take turns: what else the machine does, slows all alike.

    The first chunks, until the past is full, are not counted.
    """
    states = [model.open(ask.seed) for model in models]
    spent_ms: list[list[float]] = [[] for _ in models]
    for turn in watch(range(SETTLED_CHUNKS + rounds), "time of a chunk"):
        for model, state, spent in zip(models, states, spent_ms, strict=True):
            began_s = clock_s()
            model.step(state, Controls(ask.prompt, ask.seed))
            if turn >= SETTLED_CHUNKS:
                spent.append(1000 * (clock_s() - began_s))
    return [float(np.median(spent)) for spent in spent_ms]


def renders(config: ModelConfig, probe: Reader, asked: Sequence[Ask], start_s: float = 0.0) -> Drawn:
    """The asked scenes as the world itself shows them."""
    times_s = view_times_s(config, start_s)
    clips = torch.stack([_small(config, ask, times_s) for ask in asked])
    return Drawn(clips, probe.read(clips), [])


def _small(config: ModelConfig, ask: Ask, times_s: NDArray[np.float64]) -> Tensor:
    frames = shrink(world.render(ask.scene, times_s, config.width, config.height))
    return torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous()


def quality(drawn: Drawn, real: Drawn, asked: Sequence[Ask], config: ModelConfig, start_s: float = 0.0) -> Quality:
    """A clip counts as still if its centre moves too little, or its picture: each finds what the other overlooks.

    start_s: when the clips began; a stream that has run for a while need not be in step with the world.
    """
    moving = [place for place, ask in enumerate(asked) if "motion" in ask.words]
    agreed = agreement(drawn.answers.words, [ask.words for ask in asked])
    if not moving:
        return Quality(agreed, None, None)
    motion = measure_motion(
        drawn.answers.centres_BT2[moving],
        [asked[place].scene for place in moving],
        [view_times_s(config, start_s)] * len(moving),
        width=config.width,
        height=config.height,
        phase_known=start_s == 0,
    )
    made, expected = (picture_change(each.clips_BTCHW[moving]) for each in (drawn, real))
    should = motion.expected > 0
    shares = np.ones(len(moving))
    shares[should] = np.minimum(
        motion.speed[should] / motion.expected[should], made[should] / np.maximum(expected[should], 1e-6)
    )
    return Quality(agreed, _or_none(motion.median_error), _or_none(still_share(shares, should)))


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def floor(real: Drawn, asked: Sequence[Ask]) -> dict[str, float]:
    """Right words by attribute when every clip is held against another one's caption."""
    half = len(asked) // 2
    return agreement(real.answers.words, [ask.words for ask in (*asked[half:], *asked[:half])])


def distance(drawn: Drawn, real: Drawn) -> float:
    """Between the probe's features of both; comparable only among equal numbers of clips."""
    return frechet_distance(drawn.answers.features, real.answers.features)


def measure_drift(model: Model, probe: Reader, asked: Sequence[Ask], until: int, *, watch: Watch = unwatched) -> Drift:
    """Long streams, looked at at DRIFT_FRAMES up to `until`. A clip begins with the chunk that holds its frame."""
    config = model.config
    each, chunks = config.frames_per_chunk, clip_chunks(config)
    starts = {frame: frame // each for frame in DRIFT_FRAMES if frame <= until}
    views: dict[int, list[Tensor]] = {frame: [] for frame in starts}
    for number, ask in enumerate(asked, 1):
        state = model.open(ask.seed)
        parts: dict[int, list[Pictures]] = {frame: [] for frame in starts}
        for index in watch(range(max(starts.values()) + chunks), f"drift, stream {number} of {len(asked)}"):
            frames_THWC = model.step(state, Controls(ask.prompt, ask.seed)).frames_THWC
            for frame, start in starts.items():
                if start <= index < start + chunks:
                    parts[frame].append(frames_THWC)
        for frame in starts:
            views[frame].append(view(np.concatenate(parts[frame])[:CLIP_FRAMES]))
    points = []
    for frame in DRIFT_FRAMES:
        found = None
        if frame in starts:
            start_s, clips = starts[frame] * each / config.fps, torch.stack(views[frame])
            drawn, real = Drawn(clips, probe.read(clips), []), renders(config, probe, asked, start_s)
            found = quality(drawn, real, asked, config, start_s)
        points.append(DriftPoint(frame, found))
    strips = [[_picture(views[frame][row][0]) for frame in starts] for row in range(len(asked))]
    return Drift(points, strips)


def measure_switches(model: Model, probe: Reader, switches: Sequence[Switch], *, watch: Watch = unwatched) -> Switched:
    """Streams whose prompt changes; the probe reads the newest eight pictures of the second chunk under the new one."""
    config = model.config
    seen, true, strips = [], [], []
    for change in watch(switches, "prompt switches"):
        state, parts = model.open(change.before.seed), []
        for index in range(SETTLED_CHUNKS + SWITCHED_CHUNKS):
            ask = change.before if index < SETTLED_CHUNKS else change.after
            parts.append(model.step(state, Controls(ask.prompt, ask.seed)).frames_THWC)
        frames_THWC = np.concatenate(parts)
        seen.append(view(frames_THWC[-FRAMES:], 1))
        # The mover goes on where it was: the new scene at the same time of the stream.
        times_s = (np.arange(len(frames_THWC)) / config.fps)[-FRAMES:]
        true.append(_small(config, change.after, times_s))
        last = SWITCHED_CHUNKS * config.frames_per_chunk
        strips.append(list(shrink(frames_THWC[-last - 1 :: max(1, last // 4)])))
    rates = [_all_seen(probe.read(torch.stack(clips)).words, switches) for clips in (seen, true)]
    return Switched(rates[0], rates[1], strips)


def _all_seen(read: Sequence[dict[str, str]], switches: Sequence[Switch]) -> float:
    """Only what the new prompt says has to be seen."""
    hits = [
        all(words[name] == word for name, word in change.words.items())
        for words, change in zip(read, switches, strict=True)
    ]
    return float(np.mean(hits))


def follow_camera(
    model: Model, prompt: str, camera_THWC: Pictures, strength: float, structure: float = 0.0, seed: int = 7
) -> Pictures:
    """What a stream makes of camera pictures, as many whole chunks as they fill."""
    each, state = model.config.frames_per_chunk, model.open(seed)
    controls = Controls(prompt, seed, strength, structure)
    windows = [camera_THWC[at : at + each] for at in range(0, len(camera_THWC) - each + 1, each)]
    return np.concatenate([model.step(state, controls, window).frames_THWC for window in windows])


def pictures(clip_TCHW: Tensor) -> list[Pictures]:
    """A view's pictures, for a sheet."""
    return [_picture(frame) for frame in clip_TCHW]


def _picture(frame_CHW: Tensor) -> Pictures:
    return np.asarray(frame_CHW.permute(1, 2, 0).numpy())
