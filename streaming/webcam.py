"""The newest camera frames: a ring that never waits and never grows.

Knows when frames were taken (`pts_s`, the camera's clock) and when they arrived (`clock`). Does not know what
they are for.
"""

import time
from collections import deque
from collections.abc import Callable
from math import inf

import numpy as np

from streaming.frames import Frame


class NewestFrames:
    """The `capacity` newest frames of one camera; older ones fall out."""

    def __init__(self, capacity: int, clock: Callable[[], float] = time.monotonic) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, not {capacity}")
        self._ring: deque[tuple[Frame, float]] = deque(maxlen=capacity)
        self._clock = clock
        self._arrival_s = -inf

    def __len__(self) -> int:
        return len(self._ring)

    def put(self, frame_HWC: Frame, pts_s: float) -> None:
        """Keep a frame. One of another size, or from before the newest, starts a new history."""
        if self._ring:
            newest_HWC, newest_pts_s = self._ring[-1]
            if newest_HWC.shape != frame_HWC.shape or pts_s <= newest_pts_s:
                self._ring.clear()
        self._ring.append((frame_HWC, pts_s))
        self._arrival_s = self._clock()

    def window(self, count: int, fps: float) -> Frame | None:
        """The last `count` moments at `fps`, ending at the newest frame: uint8 (count, H, W, 3); None when empty.

        Each moment takes the frame nearest to it; before the history begins, that is the oldest frame.
        """
        if not self._ring:
            return None
        frames = [frame for frame, _ in self._ring]
        taken_s = np.array([pts_s for _, pts_s in self._ring])
        moments_s = taken_s[-1] - np.arange(count - 1, -1, -1) / fps
        nearest = np.abs(taken_s[None, :] - moments_s[:, None]).argmin(axis=1)
        return np.stack([frames[index] for index in nearest])

    def age_s(self, now_s: float | None = None) -> float:
        """Seconds since the last arrival, infinite when nothing came. `now_s` is a reading of the ring's clock."""
        return (self._clock() if now_s is None else now_s) - self._arrival_s

    def clear(self) -> None:
        self._ring.clear()
        self._arrival_s = -inf
