"""When to show the next frame: a steady rate kept by absolute deadlines.

Knows a clock and how to sleep, both injected. Does not know what is shown.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable

from streaming.frames import VIDEO_CLOCK_HZ


class Pacer:
    """Spaces frames by one period.

    Deadlines are counted from a fixed origin, so the error of one sleep never adds to the next. A frame that comes
    late leaves at once and moves the origin: the ones after it keep their distance instead of catching up.
    """

    def __init__(
        self,
        fps: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        if not fps > 0:
            raise ValueError(f"fps must be above 0, not {fps}")
        self._fps = fps
        self._clock = clock
        self._sleep = sleep
        self._first_s: float | None = None
        self._origin_s = 0.0
        self._count = 0

    async def wait(self) -> int:
        """Sleep until the next frame is due; return its media time in ticks of the 90 kHz clock.

        Media time only takes whole periods: encoders round it to their own time base, and two frames that
        round to one tick would stop them. After a pause it follows the wall clock to the nearest period.
        """
        if self._first_s is None:
            self._first_s = self._origin_s = self._clock()
        due_s = self._origin_s + self._count / self._fps
        early_s = due_s - self._clock()
        if early_s > 0:
            await self._sleep(early_s)
        else:
            self._origin_s -= early_s
        period = self._count + round((self._origin_s - self._first_s) * self._fps)
        self._count += 1
        return round(period * VIDEO_CLOCK_HZ / self._fps)
