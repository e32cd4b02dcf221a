"""Figures add up: the world itself reaches the ceiling, and a model that fails in one way is told to fail in that way.

The models here show renders, and the probe is one that knows every render it may meet (`worlds.py`).
"""

from dataclasses import replace
from itertools import count

import numpy as np
import pytest
import torch

from pipeline.chunk import Chunk, Controls
from pipeline.config import ModelConfig
from pipeline.engine import Engine
from pipeline.training.asks import CLIPS_SEED, Ask, asks
from pipeline.training.evaluate import (
    Drawn,
    at_steps,
    distance,
    draw,
    floor,
    follow_camera,
    pictures,
    quality,
    renders,
    time_chunks,
)
from pipeline.training.generic import generic_clip
from pipeline.training.probe_clips import view_times_s
from tests.pipeline.training.worlds import Knowing, Showing, World, shown

COUNT = 8


@pytest.fixture(scope="module")
def wide(config: ModelConfig) -> ModelConfig:
    return replace(config, prompt_limit=300)


@pytest.fixture(scope="module")
def asked() -> list[Ask]:
    return asks(CLIPS_SEED, COUNT)


@pytest.fixture(scope="module")
def probe(wide: ModelConfig, asked: list[Ask]) -> Knowing:
    return Knowing(wide, [(ask, view_times_s(wide, 0.0)) for ask in asked])


@pytest.fixture(scope="module")
def real(wide: ModelConfig, asked: list[Ask], probe: Knowing) -> Drawn:
    return renders(wide, probe, asked)


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
    assert made == [2] * 4 + [5] * 4 + [2, 2, 5, 5] * 3


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
