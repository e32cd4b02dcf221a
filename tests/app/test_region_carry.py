"""Every option of what held tokens show is measured, with all figures and in both modes."""

import pytest

from app import region_carry
from app.region_carry import OPTIONS, carries, with_carry
from app.region_speed import TEXT, WEBCAM
from pipeline.chunk import Controls
from tests.app.tiny import regions_engine


def test_every_option_is_measured_in_both_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(region_carry, "SEEN", ("speaker",))
    monkeypatch.setattr(region_carry, "ASKED", ("a red ball",))
    rows = carries(regions_engine(), "160x96", 0.5, 5)
    assert set(OPTIONS) == {"same_step", "own_time", "clean", "none"}
    assert [(row["mode"], row["carry"]) for row in rows] == [
        (mode, each) for mode in (WEBCAM, TEXT) for each in OPTIONS
    ]
    webcam = rows[: len(OPTIONS)]
    told = ("psnr_active", "ssim_active", "gmsd_active", "flow_ratio", "seam", "dense_ms", "sparse_ms")
    assert all(row[key] is not None for row in webcam for key in told)
    assert len({row["psnr_active"] for row in webcam}) == len(OPTIONS)


def test_an_option_changes_nothing_that_is_dense() -> None:
    engine = regions_engine()
    ours, theirs = (with_carry(engine, carry) for carry in ("none", "own_time"))
    one, other = (each.step(each.open(7), Controls("ball")) for each in (ours, theirs))
    assert (one.frames_THWC == other.frames_THWC).all()
