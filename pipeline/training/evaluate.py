"""What a model reaches: it is asked for clips, a probe reads them, and renders of the same scenes stand beside.

A model is whatever opens streams and steps through them: a student at any number of steps, or the guided teacher.
Knows no clock: whoever wants times brings one. Long streams and changes of the prompt are the business of
`evaluate_streams`, what the codec does alone that of `evaluate_codec`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.chunk import Chunk, Controls
from pipeline.config import ModelConfig
from pipeline.engine import Engine
from pipeline.sampler import with_steps
from pipeline.training import world
from pipeline.training.asks import Ask
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
CLIP_FRAMES = FRAMES * STRIDE
SETTLED_CHUNKS = 4

T = TypeVar("T")
R = TypeVar("R")
Made = Callable[[], None]
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


class Spread(Protocol):
    """Does the work for every item, some of them perhaps side by side, and returns what comes of each, in their order.

    The work says `made` after each chunk, so that a person sees how far it is; chunks: how many there are in all.
    """

    def __call__(self, work: Callable[[T, Made], R], items: Sequence[T], chunks: int, text: str) -> list[R]: ...


def one_by_one(work: Callable[[T, Made], R], items: Sequence[T], chunks: int, text: str) -> list[R]:
    return [work(item, lambda: None) for item in items]


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
    spread: Spread = one_by_one,
    text: str = "",
    keep: int = 0,
) -> Drawn:
    """One stream an ask, from its opening, for as long as the probe looks at a clip."""
    chunks = clip_chunks(model.config)

    def clip(numbered: tuple[int, Ask], made: Made) -> tuple[Tensor, Pictures | None]:
        number, ask = numbered
        state, parts = model.open(ask.seed), []
        for _ in range(chunks):
            parts.append(model.step(state, Controls(ask.prompt, ask.seed)).frames_THWC)
            made()
        frames_THWC = np.concatenate(parts)[:CLIP_FRAMES]
        return view(frames_THWC), frames_THWC if number < keep else None

    clips = spread(clip, list(enumerate(asked)), chunks * len(asked), text)
    views = torch.stack([seen for seen, _ in clips])
    return Drawn(views, probe.read(views), [frames for _, frames in clips if frames is not None])


def time_chunks(
    models: Sequence[Model], ask: Ask, clock_s: Clock, *, rounds: int = 5, spread: Spread = one_by_one
) -> list[float]:
    """Median time of a whole chunk of each model, in ms. They take turns: what else the machine does, slows all alike.

    A turn is two chunks and the second counts, for in a stream a chunk comes after one of its own. The first turn,
    until the past is full, does not.
    """
    spent_ms: list[list[float]] = [[] for _ in models]
    turns = [SETTLED_CHUNKS, *[2] * rounds]

    def take_turns(models: Sequence[Model], made: Made) -> None:
        states = [model.open(ask.seed) for model in models]
        for turn in turns:
            for model, state, spent in zip(models, states, spent_ms, strict=True):
                for _ in range(turn):
                    began_s = clock_s()
                    model.step(state, Controls(ask.prompt, ask.seed))
                    last_ms = 1000 * (clock_s() - began_s)
                    made()
                spent.append(last_ms)

    spread(take_turns, [models], sum(turns) * len(models), "time of a chunk")  # one item: nothing else runs beside it
    return [float(np.median(spent[1:])) for spent in spent_ms]


def renders(config: ModelConfig, probe: Reader, asked: Sequence[Ask], start_s: float = 0.0) -> Drawn:
    """The asked scenes as the world itself shows them."""
    times_s = view_times_s(config, start_s)
    clips = torch.stack([rendered(config, ask, times_s) for ask in asked])
    return Drawn(clips, probe.read(clips), [])


def rendered(config: ModelConfig, ask: Ask, times_s: NDArray[np.float64]) -> Tensor:
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
    return [picture(frame) for frame in clip_TCHW]


def picture(frame_CHW: Tensor) -> Pictures:
    return np.asarray(frame_CHW.permute(1, 2, 0).numpy())
