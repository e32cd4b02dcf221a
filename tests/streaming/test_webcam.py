from math import inf

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming.webcam import NewestFrames


def picture(value: int, size: int = 2) -> np.ndarray:
    return np.full((size, size, 3), value, np.uint8)


def shown(window_THWC: np.ndarray | None) -> list[int]:
    assert window_THWC is not None
    return [int(value) for value in window_THWC[:, 0, 0, 0]]


def filled(pts_s: list[float], capacity: int = 100) -> NewestFrames:
    ring = NewestFrames(capacity)
    for value, moment_s in enumerate(pts_s):
        ring.put(picture(value), moment_s)
    return ring


def test_an_empty_ring_has_no_window() -> None:
    assert NewestFrames(4).window(8, 16) is None
    assert NewestFrames(4).age_s() == inf


def test_a_window_ends_at_the_newest_frame_and_keeps_the_rate() -> None:
    ring = filled([n / 32 for n in range(20)])
    assert shown(ring.window(4, 16)) == [13, 15, 17, 19]


def test_a_slower_camera_repeats_frames() -> None:
    ring = filled([0.0, 0.1, 0.2])
    assert shown(ring.window(5, 20)) in ([0, 0, 1, 1, 2], [0, 1, 1, 1, 2], [0, 0, 1, 2, 2], [0, 1, 1, 2, 2])


def test_a_short_history_repeats_its_oldest_frame() -> None:
    assert shown(filled([5.0, 5.0 + 1 / 16]).window(5, 16)) == [0, 0, 0, 0, 1]


def test_old_frames_fall_out() -> None:
    ring = filled([n / 16 for n in range(10)], capacity=3)
    assert len(ring) == 3
    assert shown(ring.window(5, 16)) == [7, 7, 7, 8, 9]


def test_another_size_or_an_earlier_time_starts_a_new_history() -> None:
    ring = filled([1.0, 2.0])
    ring.put(picture(9, size=4), 3.0)
    assert shown(ring.window(2, 1)) == [9, 9]
    ring.put(picture(8, size=4), 0.5)
    assert shown(ring.window(2, 1)) == [8, 8]


def test_age_counts_from_the_last_arrival_not_from_the_cameras_clock() -> None:
    now_s = [50.0]
    ring = NewestFrames(4, clock=lambda: now_s[0])
    ring.put(picture(0), pts_s=0.25)
    now_s[0] = 53.0
    assert ring.age_s() == 3.0
    assert ring.age_s(51.0) == 1.0
    ring.clear()
    assert ring.age_s() == inf


@given(
    gaps_s=st.lists(st.floats(0.001, 0.3), min_size=1, max_size=30),
    count=st.integers(1, 12),
    capacity=st.integers(1, 16),
)
def test_a_window_always_has_its_count_in_order_and_ends_with_the_newest(
    gaps_s: list[float], count: int, capacity: int
) -> None:
    ring = filled([float(moment_s) for moment_s in np.cumsum(gaps_s)], capacity)
    values = shown(ring.window(count, 16))
    assert len(values) == count
    assert values == sorted(values)
    assert values[-1] == len(gaps_s) - 1


def test_a_ring_needs_room() -> None:
    with pytest.raises(ValueError, match="capacity"):
        NewestFrames(0)
