from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming.pacer import Pacer


class FakeTime:
    """A clock that only sleeping and working move. `oversleep_s` is added to each sleep, as a real loop does."""

    def __init__(self, oversleep_s: float = 0.0) -> None:
        self.now_s = 100.0
        self.oversleep_s = oversleep_s

    def clock(self) -> float:
        return self.now_s

    async def sleep(self, duration_s: float) -> None:
        assert duration_s > 0
        self.now_s += duration_s + self.oversleep_s


async def leave(fps: float, work_s: list[float], oversleep_s: float = 0.0) -> tuple[list[float], list[int]]:
    """When each frame leaves and its media time, when making frame i takes work_s[i]."""
    time = FakeTime(oversleep_s)
    pacer = Pacer(fps, time.clock, time.sleep)
    left_s, ticks = [], []
    for seconds in work_s:
        time.now_s += seconds
        ticks.append(await pacer.wait())
        left_s.append(time.now_s)
    return left_s, ticks


async def test_frames_that_are_ready_leave_at_the_rate() -> None:
    left_s, ticks = await leave(16, [0.0] * 33)
    assert left_s[-1] - left_s[0] == pytest.approx(2.0)
    assert ticks == [5625 * n for n in range(33)]


async def test_sleeping_too_long_does_not_add_up() -> None:
    left_s, _ = await leave(16, [0.0] * 161, oversleep_s=0.004)
    assert left_s[-1] - left_s[0] == pytest.approx(10.0, abs=0.005)


async def test_a_late_frame_shifts_the_clock_but_never_bursts() -> None:
    left_s, ticks = await leave(16, [0.0, 0.0, 1.0, 0.0, 0.0])
    gaps_s = [later - earlier for earlier, later in pairwise(left_s)]
    assert gaps_s == pytest.approx([1 / 16, 1.0, 1 / 16, 1 / 16])
    # Media time follows: the viewer sees a picture that held still for a second.
    assert [later - earlier for earlier, later in pairwise(ticks)] == [5625, 90_000, 5625, 5625]


@given(
    fps=st.sampled_from([8, 12.5, 15, 16, 24, 30]),
    work_s=st.lists(st.floats(0, 0.5), min_size=2, max_size=60),
)
async def test_whatever_the_producer_does_gaps_are_never_shorter_than_a_period(fps: float, work_s: list[float]) -> None:
    left_s, ticks = await leave(fps, work_s)
    for index in range(1, len(left_s)):
        assert left_s[index] - left_s[index - 1] >= 1 / fps - 1e-9
        # An encoder that counts whole periods must see a new one each time.
        assert round(ticks[index] * fps / 90_000) > round(ticks[index - 1] * fps / 90_000)
    assert (ticks[-1] - ticks[0]) / 90_000 == pytest.approx(left_s[-1] - left_s[0], abs=0.6 / fps)


def test_a_rate_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="0"):
        Pacer(0)
