"""A stream that falls apart is told from one that lasts, and a model that hears a new prompt from a deaf one."""

from dataclasses import replace

import numpy as np
import pytest

from pipeline.chunk import Controls
from pipeline.config import ModelConfig
from pipeline.engine import Engine
from pipeline.training.asks import DRIFT_SEED, Ask, Switch, asks, switches
from pipeline.training.evaluate_streams import (
    DRIFT_FRAMES,
    Glanced,
    glanced,
    measure_drift,
    measure_switches,
)
from pipeline.training.probe_clips import view_times_s
from tests.pipeline.training.worlds import Knowing, shown

DRIFTED_S = 16.0  # frame 256


@pytest.fixture(scope="module")
def wide(config: ModelConfig) -> ModelConfig:
    return replace(config, prompt_limit=300)


@pytest.fixture(scope="module")
def asked() -> list[Ask]:
    return asks(DRIFT_SEED, 3)


@pytest.fixture(scope="module")
def probe(wide: ModelConfig, asked: list[Ask]) -> Knowing:
    return Knowing(wide, [(ask, view_times_s(wide, start_s)) for ask in asked for start_s in (0.0, DRIFTED_S)])


@pytest.mark.parametrize(("until_s", "kept"), [(float("inf"), True), (2.0, False)])
def test_drift_is_read_up_to_its_limit_and_tells_a_stream_that_falls_apart(
    wide: ModelConfig, asked: list[Ask], probe: Knowing, until_s: float, kept: bool
) -> None:
    model = replace(shown(wide, asked), until_s=until_s)
    drift = measure_drift(model, probe, asked[:3], [256] * 3)
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


def test_streams_may_end_at_frames_of_their_own_and_are_held_against_their_own_opening(
    wide: ModelConfig, asked: list[Ask], probe: Knowing
) -> None:
    drift = measure_drift(shown(wide, asked), probe, asked, [256, 0, 255])
    assert [point.streams for point in drift.points] == [3, 1, 0, 0, 0]
    assert [point.opening for point in drift.points[:2]] == [1.0, 1.0]
    assert [len(strip) for strip in drift.strips] == [2] * 3
    assert (drift.strips[1][1] == 255).all()
    assert (drift.strips[0][1] != 255).any()


def test_pictures_that_nobody_looks_at_are_not_drawn_and_change_none_that_are(engine: Engine) -> None:
    chosen = Glanced(engine, {0, 1, 4})
    whole, sparing = engine.open(3), chosen.open(3)
    made = []
    for _ in range(6):
        frames, seldom = (
            each.step(state, Controls("red ball", 3)).frames_THWC
            for each, state in ((engine, whole), (chosen, sparing))
        )
        made.append(len(seldom))
        if len(made) - 1 in (0, 1, 4):
            assert np.array_equal(frames, seldom)
    each = engine.config.frames_per_chunk
    assert made == [each, each, 0, each, each, 0]


def test_drift_looks_at_every_picture_that_it_reads(engine: Engine, wide: ModelConfig, asked: list[Ask]) -> None:
    few = [replace(ask, prompt="red ball") for ask in asked[:1]]
    probe = Knowing(wide, [(ask, view_times_s(wide, start_s)) for ask in few for start_s in (0.0, DRIFTED_S)])
    often, seldom = (measure_drift(model, probe, few, [256]) for model in (engine, glanced(engine, 256)))
    assert [np.array_equal(*pair) for pair in zip(often.strips[0], seldom.strips[0], strict=True)] == [True, True]
    assert often.points == seldom.points
