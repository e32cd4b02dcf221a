"""Who may start a session, now or from a queue: one session per worker, first come, first served.

Knows nothing of what a worker is.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Generic, TypeVar

from app.errors import AppError

Worker = TypeVar("Worker")


class Admission(Generic[Worker]):
    """Hands out workers; `queue` callers may wait for one, the next is turned away with `server_busy`."""

    def __init__(self, workers: Iterable[Worker], queue: int) -> None:
        self._free = deque(workers)
        self._queue_limit = queue
        self._waiting: list[tuple[asyncio.Future[Worker], Callable[[int], None]]] = []

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @asynccontextmanager
    async def place(self, on_queued: Callable[[int], None]) -> AsyncIterator[Worker]:
        """A worker for the length of the block. on_queued: told the place in the queue, from 1, when it changes."""
        worker = await self._enter(on_queued)
        try:
            yield worker
        finally:
            self._leave(worker)

    async def _enter(self, on_queued: Callable[[int], None]) -> Worker:
        if self._free:
            return self._free.popleft()
        if len(self._waiting) >= self._queue_limit:
            raise AppError("server_busy", "All places are taken and the queue is full.", "Try again in a few minutes.")
        turn: asyncio.Future[Worker] = asyncio.get_running_loop().create_future()
        entry = (turn, on_queued)
        self._waiting.append(entry)
        on_queued(len(self._waiting))
        try:
            return await turn
        except asyncio.CancelledError:
            if entry in self._waiting:
                self._waiting.remove(entry)
                self._tell_places()
            elif not turn.cancelled():
                self._leave(turn.result())
            raise

    def _leave(self, worker: Worker) -> None:
        while self._waiting:
            turn, _ = self._waiting.pop(0)
            if not turn.done():
                turn.set_result(worker)
                self._tell_places()
                return
        self._free.append(worker)

    def _tell_places(self) -> None:
        for place, (_, on_queued) in enumerate(self._waiting, start=1):
            on_queued(place)
