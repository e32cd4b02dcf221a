"""How late the event loop is: the one figure that shows when something computes on it."""

import asyncio
from collections import deque
from collections.abc import Callable
from time import monotonic

PERIOD_S = 0.02
KEPT_S = 1.0


class LagMonitor:
    """`run` it as a task; `recent_ms` is the worst lateness of the last second."""

    def __init__(self, observe: Callable[[float], None] = lambda lag_ms: None) -> None:
        self._observe = observe
        self._recent: deque[float] = deque(maxlen=round(KEPT_S / PERIOD_S))

    async def run(self) -> None:
        while True:
            asleep_s = monotonic()
            await asyncio.sleep(PERIOD_S)
            lag_ms = max(0.0, (monotonic() - asleep_s - PERIOD_S) * 1000)
            self._recent.append(lag_ms)
            self._observe(lag_ms)

    def recent_ms(self) -> float:
        return max(self._recent, default=0.0)
