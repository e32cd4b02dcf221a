import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming.frames import fit, to_rgb, to_video


def bands(height: int, width: int, *, across: bool) -> np.ndarray:
    """Red, green and blue thirds, side by side or stacked."""
    frame_HWC = np.zeros((height, width, 3), np.uint8)
    for channel in range(3):
        if across:
            frame_HWC[:, channel * width // 3 : (channel + 1) * width // 3, channel] = 255
        else:
            frame_HWC[channel * height // 3 : (channel + 1) * height // 3, :, channel] = 255
    return frame_HWC


def test_a_wide_picture_loses_its_sides() -> None:
    fitted_HWC = fit(bands(60, 180, across=True), 30, 30)
    assert fitted_HWC.shape == (30, 30, 3)
    assert (fitted_HWC == [0, 255, 0]).all()


def test_a_tall_picture_loses_top_and_bottom() -> None:
    assert (fit(bands(180, 60, across=False), 30, 30) == [0, 255, 0]).all()


def test_the_right_aspect_keeps_everything() -> None:
    fitted_HWC = fit(bands(90, 180, across=True), 60, 30)
    assert fitted_HWC[15, [5, 30, 55]].tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]


def test_shrinking_averages() -> None:
    checker_HWC = np.indices((64, 64)).sum(axis=0)[..., None].repeat(3, axis=2) % 2 * 255
    assert fit(checker_HWC.astype(np.uint8), 8, 8) == pytest.approx(127.5, abs=1)


@given(rows=st.integers(1, 70), columns=st.integers(1, 70), height=st.integers(1, 70), width=st.integers(1, 70))
def test_any_size_fits_any_size(rows: int, columns: int, height: int, width: int) -> None:
    frame_HWC = np.full((rows, columns, 3), (10, 120, 240), np.uint8)
    fitted_HWC = fit(frame_HWC, width, height)
    assert fitted_HWC.shape == (height, width, 3)
    assert fitted_HWC.flags["C_CONTIGUOUS"]
    assert (fitted_HWC == [10, 120, 240]).all()


def test_a_video_frame_holds_the_same_pixels_and_its_time() -> None:
    frame_HWC = bands(24, 48, across=True)
    video = to_video(frame_HWC[:, ::-1], pts=5625)
    assert (to_rgb(video) == frame_HWC[:, ::-1]).all()
    assert video.time == pytest.approx(1 / 16)


def test_colours_survive_the_encoders_pixel_format() -> None:
    frame_HWC = bands(24, 48, across=True)
    restored_HWC = to_rgb(to_video(frame_HWC, pts=0).reformat(format="yuv420p"))
    centres = (slice(4, 20, 4), [8, 24, 40])
    assert restored_HWC[centres].astype(int) == pytest.approx(frame_HWC[centres].astype(int), abs=8)
