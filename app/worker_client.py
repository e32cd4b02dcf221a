"""The worker process seen from the server: started, watched, started again when it dies, stopped in the end.

Lives on the event loop and never blocks it. Knows nothing of sessions: who loses a worker asks again.
"""

import asyncio
import logging
import multiprocessing
import signal
from collections.abc import Callable
from contextlib import suppress
from enum import StrEnum
from multiprocessing.context import SpawnProcess

from app.errors import AppError, WorkerLostError
from app.mailbox import Failed, Line, Made, Order, Ready
from app.worker import EngineFactory, run_worker
from pipeline.config import ModelConfig
from pipeline.errors import PipelineError

log = logging.getLogger("stillstream.worker")

FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 10.0
CHUNK_LIMIT_S = 60.0
STOP_LIMIT_S = 5.0
LOAD_TRIES = 5  # in a row, before those who wait are told; starting it again goes on


class Health(StrEnum):
    LOADING = "loading"
    READY = "ready"
    RECOVERING = "recovering"
    STOPPED = "stopped"


class WorkerClient:
    """One worker process, kept alive."""

    def __init__(
        self,
        factory: EngineFactory,
        *,
        threads: int,
        log_level: str = "warning",
        on_restart: Callable[[], None] = lambda: None,
    ) -> None:
        self._factory = factory
        self._threads = threads
        self._log_level = log_level
        self._on_restart = on_restart
        self._stopping = asyncio.Event()
        self._line: Line | None = None
        self._process: SpawnProcess | None = None
        self._ready = asyncio.Event()
        self._lost = asyncio.Event()
        self._hopeless = asyncio.Event()
        self._failed_loads = 0
        self._keeper: asyncio.Task[None] | None = None
        self._pause_s = FIRST_PAUSE_S
        self.health = Health.LOADING
        self.restarts = 0

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    async def start(self) -> ModelConfig:
        """Start the process, wait until it is warm. Raises what the engine says when it cannot load."""
        loaded: asyncio.Future[ModelConfig] = asyncio.get_running_loop().create_future()
        self._keeper = asyncio.create_task(self._keep(loaded))
        return await loaded

    async def ready(self) -> None:
        """Wait until orders can be given. Raises AppError (`worker_failed`) when it fails to start again and again."""
        waits = [asyncio.ensure_future(event.wait()) for event in (self._ready, self._hopeless)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        if not self._ready.is_set():
            raise AppError(
                "worker_failed",
                f"The generator could not be started in {LOAD_TRIES} tries.",
                "Come back later; the server's log says why.",
            )

    async def lost(self) -> None:
        """Wait until the process has ended or failed; `ready` waits for the next one, which knows no stream."""
        await self._lost.wait()

    async def step(self, order: Order) -> Made:
        """One chunk. Raises PipelineError for the caller's mistakes, WorkerLostError when the process ended."""
        line, process = self._line, self._process
        if line is None or process is None or not self._ready.is_set():
            raise WorkerLostError("the worker is not ready")
        try:
            async with asyncio.timeout(CHUNK_LIMIT_S):
                reply = await line.exchange(order)
        except (TimeoutError, WorkerLostError) as error:
            self._give_up(process)
            raise WorkerLostError(str(error) or f"one chunk took more than {CHUNK_LIMIT_S:g} s") from error
        if isinstance(reply, Made):
            self._pause_s = FIRST_PAUSE_S
            return reply
        assert isinstance(reply, Failed), f"a worker replied {type(reply).__name__} to an order"
        if isinstance(reply.error, PipelineError):
            raise reply.error
        log.error("worker failed: %s\n%s", reply.error, reply.trace)
        self._give_up(process)
        told = reply.error if isinstance(reply.error, AppError) and reply.error.code != "internal_error" else None
        raise WorkerLostError(str(reply.error), told)

    def _give_up(self, process: SpawnProcess) -> None:
        """Give it no more orders and let it end, if it has not."""
        process.kill()
        if process is not self._process:
            return
        self._ready.clear()
        self._lost.set()
        if self.health is Health.READY:
            self.health = Health.RECOVERING

    async def stop(self) -> None:
        """Hang up, let the chunk in progress end, and join; a worker that will not end is killed."""
        busy = self.health is Health.READY
        self.health = Health.STOPPED
        self._ready.clear()
        self._stopping.set()
        if self._line is not None:
            self._line.close()
        if self._process is not None and not busy:
            self._process.kill()
        if self._keeper is None:
            return
        _, late = await asyncio.wait({self._keeper}, timeout=STOP_LIMIT_S)
        if late and self._process is not None:
            self._process.kill()
            await asyncio.wait({self._keeper})

    async def _keep(self, loaded: "asyncio.Future[ModelConfig]") -> None:
        while not self._stopping.is_set():
            self._process, self._line, gone = self._spawn()
            try:
                reply = await self._line.receive()
            except WorkerLostError as error:
                reply = Failed(AppError("worker_failed", f"The generator ended early: {error}.", "Start again."))
            if isinstance(reply, Ready):
                self._greet(reply, loaded)
            elif isinstance(reply, Failed):
                if reply.trace or self.health is Health.RECOVERING:
                    log.error("worker cannot load: %s%s", reply.error, "\n" + reply.trace if reply.trace else "")
                self._failed_loads += 1
                if self._failed_loads >= LOAD_TRIES:
                    self._hopeless.set()
                if not loaded.done():
                    loaded.set_exception(reply.error)
                    self._stopping.set()
            await gone.wait()
            self._process.join()
            self._line.close()
            self._give_up(self._process)
            if self._stopping.is_set():
                break
            self.health = Health.RECOVERING
            self.restarts += 1
            self._on_restart()
            log.warning("worker ended with code %s", self._process.exitcode)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), self._pause_s)
                break
            log.info("starting the worker again")
            self._pause_s = min(self._pause_s * 2, LONGEST_PAUSE_S)
        self.health = Health.STOPPED

    def _greet(self, reply: Ready, loaded: "asyncio.Future[ModelConfig]") -> None:
        if not self._stopping.is_set():
            self.health = Health.READY
            self._failed_loads = 0
            self._hopeless.clear()
            self._lost.clear()
            self._ready.set()
            log.info("worker ready, process %s", self.pid)
        if not loaded.done():
            loaded.set_result(reply.config)

    def _spawn(self) -> tuple[SpawnProcess, Line, asyncio.Event]:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(
            target=run_worker,
            args=(theirs, self._factory, self._threads, self._log_level),
            name="stillstream-worker",
            daemon=True,
        )
        # The child inherits the blocked signal, so Ctrl-C cannot hit it while Python is still starting there.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        theirs.close()
        gone = asyncio.Event()
        loop = asyncio.get_running_loop()

        def ended() -> None:
            loop.remove_reader(process.sentinel)
            gone.set()

        loop.add_reader(process.sentinel, ended)
        return process, Line(ours), gone
