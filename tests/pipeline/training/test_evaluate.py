"""Figures add up: the world itself reaches the ceiling, and a model that fails in one way is told to fail in that way.

The models here show renders, and the probe is one that knows every render it may meet.
"""

from dataclasses import dataclass, field, replace
from itertools import count

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.chunk import Chunk, Controls
from pipeline.config import ModelConfig
from pipeline.engine import Engine
from pipeline.training import world
from pipeline.training.asks import CLIPS_SEED, Ask, Switch, asks, switches
from pipeline.training.evaluate import (
    DRIFT_FRAMES,
    Drawn,
    at_steps,
    distance,
    draw,
    floor,
    follow_camera,
    measure_drift,
    measure_switches,
    pictures,
    quality,
    renders,
    time_chunks,
)
from pipeline.training.generic import generic_clip
from pipeline.training.measures import meant
from pipeline.training.probe import Answers
from pipeline.training.probe_clips import shrink, view_times_s

COUNT = 8
DRIFTED_S = 16.0  # frame 256


@dataclass
class Showing:
    """A stream of `World`."""

    prompts: list[str] = field(default_factory=list)


@dataclass
class World:
    """Shows what it is asked for. still: as it was at the opening. deaf: to every prompt after the first.
    until_s: afterwards it shows noise."""

    config: ModelConfig
    scenes: dict[str, world.Scene]
    still: bool = False
    deaf: bool = False
    until_s: float = float("inf")

    def open(self, seed: int) -> Showing:
        return Showing()

    def step(self, state: Showing, controls: Controls, source_THWC: np.ndarray | None = None) -> Chunk:
        config, each = self.config, self.config.frames_per_chunk
        state.prompts.append(controls.prompt)
        scene = self.scenes[state.prompts[0 if self.deaf else -1]]
        index = len(state.prompts) - 1
        times_s = np.zeros(each) if self.still else (index * each + np.arange(each)) / config.fps
        frames_THWC = world.render(scene, times_s, config.width, config.height)
        if index * each / config.fps >= self.until_s:
            frames_THWC = np.random.default_rng(1).integers(0, 256, frames_THWC.shape, np.uint8)
        return Chunk(index, 0, frames_THWC, np.zeros((config.chunk, 1, 1, 1), np.float32))


def coarse(frames_THWC: np.ndarray) -> np.ndarray:
    return frames_THWC[:, ::4, ::4].astype(np.int16)


class Knowing:
    """A probe that finds the most similar of the renders it was told of."""

    def __init__(self, config: ModelConfig, told: list[tuple[Ask, np.ndarray]]) -> None:
        size = (config.width, config.height)
        self.scenes = [ask.scene for ask, _ in told]
        self.known = np.stack([coarse(shrink(world.render(ask.scene, times_s, *size))) for ask, times_s in told])
        self.centres = np.stack([world.track(ask.scene, times_s, *size) / size for ask, times_s in told])

    def read(self, clips_BTCHW: Tensor) -> Answers:
        words, centres, features = [], [], []
        for clip in clips_BTCHW.permute(0, 1, 3, 4, 2).numpy():
            nearest = int(np.abs(self.known - coarse(clip)).mean((1, 2, 3, 4)).argmin())
            words.append({"speed": "slowly", **meant(self.scenes[nearest])})
            centres.append(self.centres[nearest])
            features.append([*clip.mean((0, 1, 2)), *clip.std((0, 1, 2))])
        return Answers(words, np.stack(centres), np.array(features))


@pytest.fixture(scope="module")
def wide(config: ModelConfig) -> ModelConfig:
    return replace(config, prompt_limit=300)


@pytest.fixture(scope="module")
def asked() -> list[Ask]:
    return asks(CLIPS_SEED, COUNT)


@pytest.fixture(scope="module")
def probe(wide: ModelConfig, asked: list[Ask]) -> Knowing:
    return Knowing(wide, [(ask, view_times_s(wide, start_s)) for ask in asked for start_s in (0.0, DRIFTED_S)])


@pytest.fixture(scope="module")
def real(wide: ModelConfig, asked: list[Ask], probe: Knowing) -> Drawn:
    return renders(wide, probe, asked)


def shown(wide: ModelConfig, asked: list[Ask], **how: bool) -> World:
    return World(wide, {ask.prompt: ask.scene for ask in asked}, **how)


def test_a_model_that_shows_the_world_reaches_the_ceiling(
    wide: ModelConfig, asked: list[Ask], probe: Knowing, real: Drawn
) -> None:
    drawn = draw(shown(wide, asked), probe, asked, keep=3)
    found, ceiling = (quality(each, real, asked, wide) for each in (drawn, real))
    assert torch.equal(drawn.clips_BTCHW, real.clips_BTCHW)
    assert found == ceiling
    assert found.score == 1
    assert found.motion_error == pytest.approx(0, abs=1e-9)
    assert found.still_share == 0
    assert distance(drawn, real) == pytest.approx(0, abs=1e-6)
    assert [len(frames) for frames in drawn.kept_THWC] == [32] * 3
    assert [picture.shape for picture in pictures(drawn.clips_BTCHW[0])] == [(96, 160, 3)] * 8


def test_the_clock_is_the_callers_and_models_take_turns(wide: ModelConfig, asked: list[Ask]) -> None:
    clock, made = count(), []

    class Slow(World):
        """Its chunks take a time of their own."""

        def __init__(self, spent_s: int) -> None:
            super().__init__(wide, {ask.prompt: ask.scene for ask in asked})
            self.spent_s = spent_s

        def step(self, state: Showing, controls: Controls, source_THWC: np.ndarray | None = None) -> Chunk:
            made.append(self.spent_s)
            for _ in range(self.spent_s - 1):
                next(clock)
            return super().step(state, controls)

    times_ms = time_chunks([Slow(2), Slow(5)], asked[0], lambda: float(next(clock)), rounds=3)
    assert times_ms == [2000.0, 5000.0]
    assert made == [2, 5] * 7


def test_a_model_that_never_moves_is_told_to_stand_still_whatever_the_probe_says(
    wide: ModelConfig, asked: list[Ask], probe: Knowing, real: Drawn
) -> None:
    drawn = draw(shown(wide, asked, still=True), probe, asked)
    assert quality(drawn, real, asked, wide).still_share == 1
    assert quality(real, real, asked, wide).still_share == 0


def test_what_no_caption_asks_for_is_not_measured(wide: ModelConfig, asked: list[Ask], real: Drawn) -> None:
    bare = [replace(ask, prompt=f"a {ask.scene.colour} {ask.scene.subject}") for ask in asked]
    found = quality(real, real, bare, wide)
    assert found.agreed == {"subject": 1.0, "colour": 1.0}
    assert (found.score, found.motion_error, found.still_share) == (1.0, None, None)


def test_captions_of_other_clips_agree_by_chance_only(asked: list[Ask], real: Drawn) -> None:
    found = floor(real, asked)
    assert np.mean(list(found.values())) < 0.5


def test_another_world_is_far_from_this_one(wide: ModelConfig, asked: list[Ask], probe: Knowing, real: Drawn) -> None:
    dark = Drawn(real.clips_BTCHW // 4, probe.read(real.clips_BTCHW // 4), [])
    assert distance(dark, real) > 100


@pytest.mark.parametrize(("until_s", "kept"), [(float("inf"), True), (2.0, False)])
def test_drift_is_read_up_to_its_limit_and_tells_a_stream_that_falls_apart(
    wide: ModelConfig, asked: list[Ask], probe: Knowing, until_s: float, kept: bool
) -> None:
    model = replace(shown(wide, asked), until_s=until_s)
    drift = measure_drift(model, probe, asked[:3], until=256)
    assert [point.frame for point in drift.points] == list(DRIFT_FRAMES)
    first, later, *rest = (point.quality for point in drift.points)
    assert rest == [None] * 3
    assert first is not None and later is not None
    assert first.score == 1
    assert (later.score == 1) == kept
    assert [len(strip) for strip in drift.strips] == [2] * 3


@pytest.mark.parametrize(("deaf", "rate"), [(False, 1.0), (True, 0.0)])
def test_a_switch_counts_when_all_that_is_new_is_seen(wide: ModelConfig, deaf: bool, rate: float) -> None:
    changes: list[Switch] = switches(3)
    both = [ask for change in changes for ask in (change.before, change.after)]
    times_s = (40 + np.arange(8)) / wide.fps  # the second chunk after the fourth
    found = measure_switches(shown(wide, both, deaf=deaf), Knowing(wide, [(ask, times_s) for ask in both]), changes)
    assert found.rate == rate
    assert found.ceiling == 1
    assert [len(strip) for strip in found.strips] == [5] * 3


def test_other_numbers_of_steps_are_the_same_weights(engine: Engine) -> None:
    few = at_steps(engine, 2)
    assert few.config.sampler.steps == (1000, 500)
    assert few.student is engine.student
    assert engine.config.sampler.steps == (1000, 750, 500, 250)


def test_a_stream_follows_whole_chunks_of_a_camera(engine: Engine) -> None:
    config = engine.config
    camera = generic_clip(np.random.default_rng(1), 20, config.width, config.height)
    made = [follow_camera(engine, "red ball", camera, strength) for strength in (0.0, 1.0)]
    assert [frames.shape for frames in made] == [(16, config.height, config.width, 3)] * 2
    assert (made[0] != made[1]).any()
