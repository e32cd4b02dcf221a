"""The event loop's lateness."""

import asyncio
import time

from app.lag import LagMonitor
from tests.app.fakes import running


async def test_a_loop_that_was_blocked_is_late_by_that_much() -> None:
    seen: list[float] = []
    monitor = LagMonitor(seen.append)
    async with running(monitor.run()):
        await asyncio.sleep(0.05)
        time.sleep(0.15)  # noqa: ASYNC251  # the fault that the monitor is for
        await asyncio.sleep(0.05)

    assert monitor.recent_ms() > 100
    assert monitor.recent_ms() == max(seen)
