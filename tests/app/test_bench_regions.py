"""The bench of region caching on a tiny model: every figure is there."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from app.bench_regions import KEYS, TOLD, measure_regions
from app.errors import AppError
from app.region_given import GivenEngine
from app.region_run import Last, compare, stretches, told, watch
from app.region_scenes import scenes, shoot
from pipeline.chunk import Chunk, Controls
from pipeline.engine import Engine
from tests.app.tiny import TINY, regions_engine, write_tiny_model


@pytest.fixture(scope="module")
def engine() -> Engine:
    made: Engine = regions_engine()
    return made


def test_a_scenario_ends_with_its_figures(engine: Engine) -> None:
    scene = scenes(160, 96)["visitor"]
    shots = [shoot(scene, index) for index in range(8)]
    seen = watch(engine, Controls("ball", regions=0.5), shots, lambda one, other: (one - other).abs().mean())
    row = told(seen)
    assert {*TOLD} <= set(row) <= set(KEYS)
    assert [each.index for each in seen] == [3, 4, 5, 6, 7]
    assert 0 < row["active_fraction"] < 0.7
    assert row["mask_recall"] == 1
    assert row["psnr_active"] > 20
    assert 0 < row["lpips_active"] < 2
    assert row["speedup"] > 0
    assert 0 < row["encoded_bytes_ratio"] < 1.1


def test_a_part_of_a_scenario_is_told_by_itself(engine: Engine) -> None:
    shots = [shoot(scenes(160, 96)["cut"], index) for index in range(5, 11)]  # other pictures from its fourth on
    seen = watch(engine, Controls("ball", regions=0.5), shots)
    whole, calm, after = stretches("cut", seen, {"calm": range(4, 6), "cut": range(3, 4)})
    assert [row["scenario"] for row in (whole, calm, after)] == ["cut", "cut, calm", "cut, cut"]
    assert after["active_fraction"] == 1
    assert calm["active_fraction"] is not None and calm["active_fraction"] <= whole["active_fraction"] <= 1


def test_a_true_mask_is_the_change_itself_and_misses_nothing(engine: Engine) -> None:
    shots = [shoot(scenes(160, 96)["speaker"], index) for index in range(7)]
    seen = watch(GivenEngine(engine), Controls("ball", regions=0.5), shots, true_mask=True)
    assert all(each.truth_HW.any() and np.array_equal(each.asked_HW, each.truth_HW) for each in seen)
    row = told(seen)
    assert row["mask_recall"] == row["mask_precision"] == 1


def test_a_model_that_cannot_hold_tiles_is_refused(tmp_path: Path) -> None:
    student = replace(TINY.student, patch_size=(1, 1, 1))
    write_tiny_model(tmp_path / "model", replace(TINY, width=80, height=48, student=student))
    with pytest.raises(AppError) as refused:
        measure_regions(tmp_path / "model", 1, 0.5, 4, [])

    assert refused.value.code == "regions_unsupported"


def test_a_scenario_that_there_is_not_is_refused_and_those_that_there_are_are_named(tiny_model: Path) -> None:
    with pytest.raises(AppError) as refused:
        measure_regions(tiny_model, 1, 0.5, 4, ["speaker", "spaeker"])

    assert refused.value.code == "scenario_unknown"
    assert "spaeker" in refused.value.message
    assert all(name in refused.value.remedy for name in ("speed-wide", "speaker", "rain", "free run", "blue fish"))


def test_a_held_tile_that_should_have_changed_is_a_ghost_and_a_late_refresh_pops() -> None:
    mask, none = np.array([[1, 0, 0]], bool), np.zeros((1, 3), bool)
    empty = np.full((8, 32, 96, 3), 90, np.uint8)
    thing, latent = empty.copy(), np.zeros((1, 1, 1, 1), np.float32)
    thing[:, :, 36:60] = 200

    def chunk(frames: np.ndarray, active_HW: np.ndarray, refreshed_HW: np.ndarray | None = None) -> Chunk:
        return Chunk(5, 0, frames, latent, active_HW=active_HW, refreshed_HW=refreshed_HW)

    dense, truth, last = chunk(empty, mask), np.array([[0, 1, 0]], bool), Last(thing[-1], empty[-1], mask)
    held = compare(chunk(thing, mask), dense, dense, last, truth, empty[:4], None)
    assert (held["ghost"], held["pop"]) == (1, None)
    seen = compare(chunk(empty, mask | truth, truth), dense, dense, last, truth, empty[:4], None)
    assert (seen["ghost"], seen["pop"], seen["pop_0"]) == (0, 110 * 24 / 32, 0)
    calm = compare(chunk(empty, mask, none), dense, dense, Last(empty[-1], empty[-1], mask), none, empty[:4], None)
    assert (calm["ghost"], calm["pop"]) == (None, None)
