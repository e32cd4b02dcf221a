"""All that passes between a session and its worker process.

`Inbox` (latest wins) and `Outbox` (bounded) are the session's two boxes and live on the event loop; `Line` is the only
process crossing: one `Order` goes out, one reply comes back, on a thread of its own, so that the loop never waits for
a pipe. Knows nothing of peers, engines or what a prompt means.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection

import numpy as np

from app.errors import WorkerLostError
from pipeline.chunk import Chunk, Controls
from pipeline.config import ModelConfig


@dataclass(frozen=True)
class Order:
    """What to make next: a snapshot taken when a slot was free. fresh: the stream starts again from its seed."""

    controls: Controls
    source_THWC: np.ndarray | None = None
    fresh: bool = False


def opening(controls: Controls, still_THWC: np.ndarray) -> Order:
    """A stream's first chunk, where it begins with a picture: that picture, standing still."""
    return Order(replace(controls, strength=0.0), still_THWC, fresh=True)


@dataclass(frozen=True)
class Ready:
    """The worker has loaded and warmed its engine."""

    config: ModelConfig


@dataclass(frozen=True)
class Made:
    """One chunk, how long it and its stages took, and words of its prompt that the model does not know."""

    chunk: Chunk
    chunk_ms: float
    stages_ms: dict[str, float]
    unknown_words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Failed:
    """An error instead of a chunk. trace: for the server's log, empty when the caller was at fault."""

    error: Exception
    trace: str = ""


Reply = Ready | Made | Failed


class Inbox:
    """Holds the newest Controls; older ones that no order has read are forgotten.

    still_THWC: the picture that the stream begins with, as often as its first chunk shows it; None: from the prompt.
    """

    def __init__(self, controls: Controls, source: Callable[[], np.ndarray | None]) -> None:
        self.controls = controls
        self.still_THWC: np.ndarray | None = None
        self._source = source
        self._fresh = True

    def post(self, *, fresh: bool = False, **changes: object) -> None:
        self.controls = replace(self.controls, **changes)  # type: ignore[arg-type]
        self._fresh = self._fresh or fresh

    def restart(self) -> None:
        """The next order starts the stream again."""
        self._fresh = True

    def snapshot(self) -> Order:
        fresh, self._fresh = self._fresh, False
        if fresh and self.still_THWC is not None:
            return opening(self.controls, self.still_THWC)
        return Order(self.controls, self._source(), fresh)


class Outbox:
    """A bounded queue of chunks. A slot is reserved before its chunk is made and free when its frames have left."""

    def __init__(self, slots: int) -> None:
        self._slots = asyncio.Semaphore(slots)
        self._waiting: deque[tuple[Made, float]] = deque()
        self._filled = asyncio.Event()

    async def reserve(self) -> None:
        await self._slots.acquire()

    def put(self, made: Made, asked_s: float) -> None:
        """asked_s: when the chunk's snapshot was taken."""
        self._waiting.append((made, asked_s))
        self._filled.set()

    async def take(self) -> tuple[Made, float]:
        """The oldest chunk; call `free` once its frames have left."""
        while not self._waiting:
            self._filled.clear()
            await self._filled.wait()
        return self._waiting.popleft()

    def free(self) -> None:
        self._slots.release()

    def drop_older(self, epoch: int) -> int:
        """Forget waiting chunks of earlier epochs. Returns how many frames went with them."""
        chunks = [made.chunk for made, _ in self._waiting]
        self._waiting = deque(entry for entry in self._waiting if entry[0].chunk.epoch >= epoch)
        stale = [chunk for chunk in chunks if chunk.epoch < epoch]
        for _ in stale:
            self.free()
        return sum(len(chunk.frames_THWC) for chunk in stale)


class Line:
    """The server's end of the pipe to one worker process."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="worker-line")
        self._closed = False

    async def receive(self) -> Reply:
        return await self._on_thread(self._connection.recv)

    async def exchange(self, order: Order) -> Reply:
        """Send an order and wait for its reply. A cancelled exchange still runs to its end before the next."""

        def send_and_receive() -> Reply:
            self._connection.send(order)
            reply: Reply = self._connection.recv()
            return reply

        return await self._on_thread(send_and_receive)

    def close(self) -> None:
        """Hang up, after the exchange in progress. The worker takes it as the order to end."""
        if self._closed:
            return
        self._closed = True
        self._thread.submit(self._connection.close)
        self._thread.shutdown(wait=False)

    async def _on_thread(self, call: Callable[[], Reply]) -> Reply:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, call)
        except (EOFError, OSError) as error:
            raise WorkerLostError("the worker hung up") from error
