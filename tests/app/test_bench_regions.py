"""The bench of region caching on a tiny model: every figure is there, and a mask that was given is the one that ran."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from app.bench_regions import KEYS, READ, measure_regions, run, speeds
from app.errors import AppError
from app.region_free import free_run
from app.region_scenes import scenes, shoot
from pipeline.chunk import Controls
from pipeline.engine import Engine
from pipeline.training.probe import Probe
from tests.app.tiny import TINY, regions_engine, write_tiny_model


@pytest.fixture(scope="module")
def engine() -> Engine:
    made: Engine = regions_engine()
    return made


def test_a_scenario_ends_with_its_figures(engine: Engine) -> None:
    scene, noise = scenes(160, 96)["visitor"]
    sources = [shoot(scene, noise, index) for index in range(8)]
    row = run(engine, Controls("ball", regions=0.5), sources, "visitor", lambda one, other: (one - other).abs().mean())
    assert set(row) | {"size", "mode"} <= set(KEYS)
    assert 0 < row["active_fraction"] < 0.7
    assert row["mask_recall"] == 1
    assert row["psnr_active"] > 20
    assert 0 < row["lpips_active"] < 2
    assert row["speedup"] > 0


def test_times_are_told_for_each_share_of_tiles(engine: Engine) -> None:
    rows = speeds(engine, "160x96", 1, (0.2, 1.0))
    assert [row["active_fraction"] for row in rows] == [0.2, 1.0]
    assert all(row["dense_ms"] > 0 and row["sparse_ms"] > 0 for row in rows)


@pytest.mark.parametrize("follows", [False, True], ids=["text", "webcam"])
def test_a_free_run_is_read_by_the_probe(engine: Engine, follows: bool) -> None:
    torch.manual_seed(1)
    found = free_run(engine, Probe().eval(), 0.5, 8, follows)
    assert set(found) == set(READ)
    assert all(value is not None and np.isfinite(value) for value in found.values())


def test_a_dial_that_is_off_leaves_no_gap(engine: Engine) -> None:
    torch.manual_seed(1)
    found = free_run(engine, Probe().eval(), 0.0, 8, False)
    assert found["probe_gap"] == found["motion_gap"] == 0
    assert found["fd_ratio"] == 1


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
