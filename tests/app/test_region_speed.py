"""Times are told of the share of tiles that was asked for, in each mode and on the way that the mode takes."""

import numpy as np
import pytest

from app.region_given import GivenEngine
from app.region_scenes import scenes, shoot
from app.region_speed import PAINTED, TEXT, WEBCAM, Spent, cost_model, paired, patch, speeds_of
from pipeline.chunk import Controls
from pipeline.engine import Engine
from tests.app.tiny import regions_engine


@pytest.fixture(scope="module")
def engine() -> Engine:
    made: Engine = regions_engine()
    return made


@pytest.mark.parametrize("mode", [PAINTED, WEBCAM, TEXT])
def test_each_mode_computes_the_share_that_it_is_given(engine: Engine, mode: str) -> None:
    rows = speeds_of(engine, mode, 2, 0.5, (0.2, 1.0))
    assert [row["active_fraction"] for row in rows] == [0.2, 1.0]
    assert all(row["dense_ms"] > 0 and row["sparse_ms"] > 0 for row in rows)


def test_a_patch_has_its_share_of_tiles_in_one_piece() -> None:
    for share, count in ((0.01, 1), (0.1, 6), (0.5, 30), (1.0, 60)):
        mask = patch((6, 10), share)
        assert mask.sum() == count
        rows, columns = np.nonzero(mask)
        assert mask[: rows.max() + 1, : columns.max()].sum() >= count - 10


def test_a_cost_model_finds_the_fixed_part_and_that_of_the_tiles() -> None:
    shares = [0.1, 0.2, 0.3]
    assert cost_model(shares, [0.15 + 0.9 * share for share in shares]) == pytest.approx((0.15, 0.9))
    assert cost_model(shares, shares) == pytest.approx((0, 1))


def test_what_is_told_are_medians_and_their_ratios() -> None:
    row = paired([Spent(10, 8), Spent(20, 8), Spent(900, 8)], [Spent(5, 2), Spent(5, 2)])
    assert row == {"dense_ms": 20, "sparse_ms": 5, "speedup": 4, "cpu_speedup": 4}


def test_a_given_mask_is_the_one_that_runs_once_something_is_held(engine: Engine) -> None:
    given, scene = GivenEngine(engine), scenes(160, 96)["pan"]
    for sources in ([shoot(scene, index)[1] for index in range(6)], [None] * 6):
        state, ran = given.open(7), []
        for index, source in enumerate(sources):
            given.given_HW = None if index == 5 else patch((3, 5), 0.2)
            ran.append(given.step(state, Controls("ball", regions=0.5), source).active_HW)
        assert [mask is None for mask in ran] == [True, True, True, False, False, True]
        assert all(np.array_equal(mask, patch((3, 5), 0.2)) for mask in ran[3:5])


def test_a_given_mask_leaves_dense_chunks_alone(engine: Engine) -> None:
    given = GivenEngine(engine)
    given.given_HW = patch((3, 5), 0.2)
    state, twin = given.open(7), engine.open(7)
    for _ in range(4):
        ours, plain = given.step(state, Controls("ball")), engine.step(twin, Controls("ball"))
    assert np.array_equal(ours.frames_THWC, plain.frames_THWC)


def test_a_stream_that_is_given_its_own_masks_draws_what_it_drew(engine: Engine) -> None:
    """With the same keys for held tokens, too."""
    given, controls = GivenEngine(engine), Controls("ball", regions=0.5)
    state, twin = given.open(7), engine.open(7)
    shots, sparse = [shoot(scenes(160, 96)["speaker"], index)[1] for index in range(7)], 0
    for source in shots:
        own = engine.step(twin, controls, source)
        given.given_HW = own.active_HW
        assert np.array_equal(given.step(state, controls, source).latents_TCHW, own.latents_TCHW)
        sparse += own.active_HW is not None and not own.active_HW.all()
    assert sparse >= 3
