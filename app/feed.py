"""The flow of one stream's chunks: reserve a slot, snapshot what is wanted, have it made, hand the frames on.

Two loops share an outbox: one asks the worker, one fills the track; a third watches over the worker. A change raises
the epoch: the slot is free at once, so the next chunk follows the change, and the old frames play until it is there
and are dropped then; so a change costs no gap, and many quick changes cannot starve the picture. Knows nothing of the
wire.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from app.errors import AppError, WorkerLostError
from app.mailbox import Inbox, Made, Order, Outbox
from pipeline.errors import PipelineError

LOSSES_LIMIT = 3
SLOTS = 1


@dataclass(frozen=True)
class Tag:
    """Travels with a chunk's frames. asked_s: when its snapshot was taken."""

    epoch: int
    index: int
    asked_s: float


class Track(Protocol):
    on_shown: Callable[[Any], None] | None

    def put(self, frames_THWC: np.ndarray, tag: Any = None) -> Awaitable[None]: ...
    def flush(self) -> int: ...


class Worker(Protocol):
    async def ready(self) -> None: ...
    async def lost(self) -> None: ...
    async def step(self, order: Order) -> Made: ...


class Listener(Protocol):
    """What a feed tells its session."""

    def taken(self, epoch: int, index: int) -> None:
        """The worker takes on chunk `index`, the first that knows of `epoch` and all before it."""

    def made(self, order: Order, made: Made) -> None: ...
    def shown(self, epoch: int, latency_ms: float) -> None:
        """A chunk's first frame left for the encoder, so long after its snapshot."""

    def refused(self, error: PipelineError) -> None:
        """The controls cannot be drawn; the picture rests until they change."""

    def recovering(self, lost: bool) -> None:
        """The worker was lost, or is back."""


class Feed:
    """One stream's chunks, from the moment `run` is called until it is cancelled."""

    def __init__(self, inbox: Inbox, listener: Listener, clock: Callable[[], float]) -> None:
        self._inbox = inbox
        self._listener = listener
        self._clock = clock
        self._outbox = Outbox(SLOTS)
        self._track: Track | None = None
        self._playing = asyncio.Event()
        self._wanted = asyncio.Event()
        self._refused_epoch: int | None = None
        self._hold: asyncio.Event | None = None
        self.next_index = 0  # of the chunk that the worker takes on next
        self.frames_dropped = 0
        self._settle()

    @property
    def epoch(self) -> int:
        return self._inbox.controls.epoch

    def change(self, *, fresh: bool = False, **changes: object) -> None:
        """Draw something else from the next chunk on. fresh: start the stream again."""
        self._inbox.post(fresh=fresh, epoch=self.epoch + 1, **changes)
        self.frames_dropped += self._outbox.drop_older(self.epoch)
        if self._hold is not None:
            self._hold.set()
        self._settle()

    def pause(self, paused: bool) -> None:
        """Let the picture rest, or go on."""
        self._inbox.post(paused=paused)
        if paused and self._track is not None:
            self._track.flush()
        self._settle()

    async def run(self, worker: Worker, track: Track) -> None:
        self._track = track
        track.on_shown = self._shown
        try:
            async with asyncio.TaskGroup() as loops:
                loops.create_task(self._watch(worker))
                loops.create_task(self._make(worker))
                loops.create_task(self._deliver(track, loops))
        except* AppError as errors:
            raise errors.exceptions[0] from None

    async def _watch(self, worker: Worker) -> None:
        while True:
            await worker.lost()
            self._inbox.restart()
            self._listener.recovering(True)
            await worker.ready()
            self._listener.recovering(False)

    async def _make(self, worker: Worker) -> None:
        losses = 0
        await worker.ready()
        while True:
            await self._outbox.reserve()
            await self._wanted.wait()
            order = self._inbox.snapshot()
            index = 0 if order.fresh else self.next_index
            self.next_index = index + 1
            self._listener.taken(order.controls.epoch, index)
            asked_s = self._clock()
            try:
                made = await worker.step(order)
            except PipelineError as error:
                self._give_back(order, index)
                self._refused_epoch = order.controls.epoch
                self._settle()
                self._listener.refused(error)
            except WorkerLostError as error:
                self._give_back(order, index)
                losses += 1
                if losses >= LOSSES_LIMIT:
                    raise error.told or AppError(
                        "worker_failed",
                        f"The generator stopped {losses} times without making a picture.",
                        "Try another prompt; the server's log says more.",
                    ) from error
                await worker.ready()
            else:
                losses = 0
                self._outbox.put(made, asked_s)
                self._listener.made(order, made)

    def _give_back(self, order: Order, index: int) -> None:
        self._outbox.free()
        self.next_index = index
        if order.fresh:
            self._inbox.restart()

    async def _deliver(self, track: Track, loops: asyncio.TaskGroup) -> None:
        on_track = self.epoch
        while True:
            made, asked_s = await self._outbox.take()
            await self._playing.wait()
            chunk = made.chunk
            if chunk.epoch > on_track:
                track.flush()
                on_track = chunk.epoch
            hold = self._hold = asyncio.Event()
            putting = self._put(track, chunk.frames_THWC, Tag(chunk.epoch, chunk.index, asked_s), hold)
            loops.create_task(putting)
            # Frames that are already out of date may still bridge the gap, but keep no slot.
            if chunk.epoch >= self.epoch:
                await hold.wait()
            self._outbox.free()

    async def _put(self, track: Track, frames_THWC: np.ndarray, tag: Tag, done: asyncio.Event) -> None:
        await track.put(frames_THWC, tag)
        done.set()

    def _shown(self, tag: Tag) -> None:
        self._listener.shown(tag.epoch, (self._clock() - tag.asked_s) * 1000)

    def _settle(self) -> None:
        controls = self._inbox.controls
        for event, holds in (
            (self._playing, not controls.paused),
            (self._wanted, not controls.paused and self._refused_epoch != controls.epoch),
        ):
            if holds:
                event.set()
            else:
                event.clear()
