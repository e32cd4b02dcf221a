"""Small stand-ins: an engine that paints what it is told, a track, a peer, a worker, a page and a clock."""

import asyncio
import contextlib
import os
import signal
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from app.errors import AppError, WorkerLostError
from app.mailbox import Made, Order
from app.worker import Trace
from pipeline.chunk import Chunk, Controls
from pipeline.config import CodecConfig, ModelConfig
from pipeline.errors import PipelineError

CONFIG = ModelConfig(
    name="fake",
    width=64,
    height=32,
    fps=16,
    chunk=1,
    prompt_limit=40,
    examples=("a red ball",),
    codec=CodecConfig(frames=4),
)
COLOURS = {"red": (200, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 200)}


def paint(controls: Controls, index: int, source_THWC: np.ndarray | None) -> Chunk:
    """Frames in the prompt's colour with a white bar that moves; a source shows through by its strength."""
    colour = next((rgb for name, rgb in COLOURS.items() if name in controls.prompt), (90, 90, 90))
    frames_THWC = np.zeros((CONFIG.frames_per_chunk, CONFIG.height, CONFIG.width, 3), np.uint8)
    frames_THWC[:] = colour
    for time_step, frame in enumerate(frames_THWC):
        column = (controls.seed + index * CONFIG.frames_per_chunk + time_step) * 2 % CONFIG.width
        frame[:, column : column + 4] = 255
    if source_THWC is not None:
        mixed = controls.strength * frames_THWC + (1 - controls.strength) * source_THWC
        frames_THWC = mixed.astype(np.uint8)
    latents_TCHW = np.full((1, 1, 2, 2), index + controls.seed, np.float32)
    return Chunk(index, controls.epoch, frames_THWC, latents_TCHW)


class FakeText:
    """Knows every word but `dragon`."""

    def unknown(self, prompt: str) -> list[str]:
        return [word for word in prompt.split() if word == "dragon"]


@dataclass
class FakeState:
    seed: int
    index: int = 0


class FakeEngine:
    """Prompts `refuse`, `crash`, `die` and `hang` do what they say; the last two as if from outside, mid-chunk.

    `memory` is more than a GPU has.
    """

    config = CONFIG
    text = FakeText()

    def __init__(self, trace: Trace) -> None:
        self._trace = trace

    def warm_up(self) -> None:
        self.step(self.open(0), Controls("warm up"))

    def open(self, seed: int) -> FakeState:
        return FakeState(seed)

    def reset(self, state: FakeState, seed: int) -> None:
        state.seed, state.index = seed, 0

    def step(self, state: FakeState, controls: Controls, source_THWC: np.ndarray | None = None) -> Chunk:
        if controls.prompt == "refuse":
            raise PipelineError("prompt_refused", "The prompt 'refuse' cannot be drawn.", "Try another.")
        if controls.prompt == "crash":
            raise RuntimeError("out of memory")
        if controls.prompt == "memory":
            run_out()
        if controls.prompt == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if controls.prompt == "hang":
            os.kill(os.getpid(), signal.SIGSTOP)
        with self._trace("text"), self._trace("decode"):
            time.sleep(0.01)
            chunk = paint(controls, state.index, source_THWC)
        state.index += 1
        return chunk


CUDA_FULL = (
    "CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 79.11 GiB of which 12.62 MiB is "
    "free. Including non-PyTorch memory, this process has 70.94 GiB memory in use. Of the allocated memory 70.00 GiB "
    "is allocated by PyTorch, and 512.00 MiB is reserved by PyTorch but unallocated."
)


def run_out() -> None:
    import torch

    raise torch.OutOfMemoryError(CUDA_FULL)


def load_too_much(trace: Trace) -> FakeEngine:
    run_out()
    return FakeEngine(trace)


def load_fake(trace: Trace) -> FakeEngine:
    return FakeEngine(trace)


@dataclass(frozen=True)
class LoadLater:
    """Loads once the file `now` is there."""

    now: Path

    def __call__(self, trace: Trace) -> FakeEngine:
        while not self.now.exists():
            time.sleep(0.01)
        return FakeEngine(trace)


@dataclass(frozen=True)
class LoadWhile:
    """Loads as long as the file is there."""

    there: Path

    def __call__(self, trace: Trace) -> FakeEngine:
        if not self.there.exists():
            raise PipelineError("weights_missing", "The weights are gone.", "Put them back.")
        return FakeEngine(trace)


def load_damaged(trace: Trace) -> FakeEngine:
    raise PipelineError("weights_damaged", "The weights do not match their checksum.", "Download them again.")


def load_pid_environment(trace: Trace) -> FakeEngine:
    """Fails with what the process was given, so that a test can read it."""
    import sys

    names = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    found = ",".join(os.environ.get(name, "") for name in names)
    raise PipelineError("environment", f"{found},{'torch' in sys.modules}", "")


class FakeClock:
    """Time moves only when `advance` is called."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._sleepers: list[tuple[float, asyncio.Future[None]]] = []

    def __call__(self) -> float:
        return self.now_s

    async def sleep(self, seconds: float) -> None:
        wake: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._sleepers.append((self.now_s + seconds, wake))
        await wake

    async def advance(self, seconds: float) -> None:
        self.now_s += seconds
        for due_s, wake in self._sleepers:
            if due_s <= self.now_s and not wake.done():
                wake.set_result(None)
        self._sleepers = [(due_s, wake) for due_s, wake in self._sleepers if not wake.done()]
        await settle()


async def settle() -> None:
    """Let every task do what it can."""
    for _ in range(30):
        await asyncio.sleep(0)


class FakeTrack:
    """A queue of frames; `show` plays the part of the encoder."""

    def __init__(self, buffer_frames: int) -> None:
        self.buffer_frames = buffer_frames
        self.on_shown: Callable[[Any], None] | None = None
        self.frames_shown = self.frames_dropped = 0
        self.shown_THWC: list[np.ndarray] = []
        self._frames: deque[tuple[np.ndarray, Any]] = deque()
        self._changed = asyncio.Event()
        self._flushes = 0

    @property
    def queue_frames(self) -> int:
        return len(self._frames)

    async def put(self, frames_THWC: np.ndarray, tag: Any = None) -> None:
        flushes = self._flushes
        while self._frames and len(self._frames) + len(frames_THWC) > self.buffer_frames and flushes == self._flushes:
            self._changed.clear()
            await self._changed.wait()
        if flushes != self._flushes:
            self.frames_dropped += len(frames_THWC)
            return
        self._frames.extend((frame, tag if place == 0 else None) for place, frame in enumerate(frames_THWC))

    def flush(self) -> int:
        dropped = len(self._frames)
        self._frames.clear()
        self._flushes += 1
        self.frames_dropped += dropped
        self._changed.set()
        return dropped

    def show(self, count: int = CONFIG.frames_per_chunk) -> list[np.ndarray]:
        frames = []
        for _ in range(min(count, len(self._frames))):
            frame, tag = self._frames.popleft()
            frames.append(frame)
            self.frames_shown += 1
            if tag is not None and self.on_shown is not None:
                self.on_shown(tag)
        self._changed.set()
        return frames


class FakePeer:
    """Answers any offer; the test says when media connects."""

    def __init__(self, *, on_frame: Any, on_state: Any, buffer_frames: int, **rest: Any) -> None:
        self.on_frame, self.on_state = on_frame, on_state
        self.track = FakeTrack(buffer_frames)
        self.candidates: list[Any] = []
        self.closed = False

    async def answer(self, offer_sdp: str) -> str:
        return f"answer to {offer_sdp}"

    async def add_candidate(self, candidate: Any) -> None:
        self.candidates.append(candidate)

    async def close(self) -> None:
        self.closed = True


class FakeWorker:
    """Makes chunks when `make` is called, as the real worker would, without a process. chunk_ms, active_HW: of them."""

    def __init__(self) -> None:
        self.orders: list[Order] = []
        self.chunk_ms = 10.0
        self.active_HW: np.ndarray | None = None
        self.alive, self.dead = asyncio.Event(), asyncio.Event()
        self.alive.set()
        self._reply: asyncio.Future[None] | None = None
        self._state = FakeState(0)

    async def ready(self) -> None:
        await self.alive.wait()

    async def lost(self) -> None:
        await self.dead.wait()

    async def step(self, order: Order) -> Made:
        self.orders.append(order)
        if order.controls.prompt == "refuse":
            raise PipelineError("prompt_refused", "The prompt 'refuse' cannot be drawn.", "Try another.")
        if order.fresh:
            self._state = FakeState(order.controls.seed)
        self._reply = asyncio.get_running_loop().create_future()
        await self._reply
        chunk = replace(paint(order.controls, self._state.index, order.source_THWC), active_HW=self.active_HW)
        self._state.index += 1
        return Made(chunk, self.chunk_ms, {"decode": 4.0}, tuple(FakeText().unknown(order.controls.prompt)))

    async def make(self) -> None:
        """Finish the chunk that is being made."""
        await settle()
        assert self._reply is not None, "no chunk was asked for"
        assert not self._reply.done(), "no further chunk was asked for"
        self._reply.set_result(None)
        await settle()

    async def die(self, told: AppError | None = None) -> None:
        await settle()
        self.alive.clear()
        self.dead.set()
        assert self._reply is not None
        self._reply.set_exception(WorkerLostError("killed", told))
        await settle()

    async def come_back(self) -> None:
        self.dead.clear()
        self.alive.set()
        await settle()


@dataclass
class FakePage:
    """The far end of a session's channel."""

    heard: list[dict[str, Any]] = field(default_factory=list)
    said: "asyncio.Queue[str | Exception]" = field(default_factory=asyncio.Queue)

    async def receive(self) -> str:
        text = await self.said.get()
        if isinstance(text, Exception):
            raise text
        return text

    def send(self, message: dict[str, Any]) -> None:
        self.heard.append(message)

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [message for message in self.heard if message["kind"] == kind]

    @property
    def states(self) -> list[str]:
        return [message["state"] for message in self.of("state")]

    @property
    def codes(self) -> list[str]:
        return [message["code"] for message in self.of("error")]


@contextlib.asynccontextmanager
async def running(work: Any) -> Any:
    """A task for the length of a block."""
    task = asyncio.create_task(work)
    try:
        await settle()
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
