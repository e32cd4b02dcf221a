"""The process that owns the device, seen from inside: receive an order, make the chunk, reply.

Starts with neither torch nor the engine imported, so that threads and wait policy are settled before OpenMP wakes up.
Knows nothing of the event loop or the wire. `app.worker_client` is the same process seen from the server.
"""

import logging
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import inf
from multiprocessing import connection, parent_process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from app.errors import SPOKEN, AppError, memory_short
from app.mailbox import Failed, Made, Order, Ready
from app.stopwatch import Stopwatch
from pipeline.chunk import Chunk, Controls
from pipeline.config import ModelConfig, WanModel
from pipeline.errors import PipelineError

log = logging.getLogger("stillstream.worker")

OPENMP_WAIT_POLICY = "PASSIVE"
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")

Trace = Callable[[str], AbstractContextManager[None]]


class TextLike(Protocol):
    def unknown(self, prompt: str) -> list[str]: ...


class EngineLike(Protocol):
    """What a worker asks of `pipeline.engine.Engine`."""

    @property
    def config(self) -> ModelConfig: ...
    @property
    def text(self) -> TextLike: ...
    def warm_up(self) -> None: ...
    def open(self, seed: int) -> Any: ...
    def step(self, state: Any, controls: Controls, source_THWC: np.ndarray | None = None) -> Chunk: ...
    def reset(self, state: Any, seed: int) -> None: ...


EngineFactory = Callable[[Trace], EngineLike]


@dataclass(frozen=True)
class LoadEngine:
    """The real engine's factory; it pickles, and imports torch only when called.

    steps: denoise passes, evenly spaced; None, or as many as the model has: its own. step_cache: what `Engine` takes.
    """

    model: Path | WanModel | None
    device: str
    threads: int
    loras: tuple[Path, ...] = ()
    lora_strength: float = 1.0
    steps: int | None = None
    step_cache: float = 0.0

    def __call__(self, trace: Trace) -> EngineLike:
        import torch

        from pipeline.engine import Engine

        try:
            torch.empty(1, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise memory_short(error) or AppError(
                "device_unusable", f"This machine cannot compute on {self.device!r}.", "Choose cpu, or run the doctor."
            ) from error
        engine = Engine.load(
            self.model,
            device=self.device,
            threads=self.threads,
            trace=trace,
            loras=self.loras,
            lora_strength=self.lora_strength,
        )
        engine.step_cache = self.step_cache
        if self.steps not in (None, len(engine.config.sampler.steps)):
            from pipeline.sampler import with_steps

            engine.config = with_steps(engine.config, self.steps)
        made: EngineLike = engine
        return made


def usable_cores() -> int:
    """Cores that this process may use, which a container or taskset can make fewer than the machine has."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(cores, quota_cores(CPU_QUOTA))))


def quota_cores(path: Path) -> float:
    """Cores' worth of time that a container is given. More threads than that are all stopped when it is used up."""
    try:
        quota, period = path.read_text().split()
        return int(quota) / int(period)
    except (OSError, ValueError):  # no such file, or no limit: "max 100000"
        return inf


def default_threads(workers: int = 1) -> int:
    """Two threads on two cores; beyond that one core stays with the event loop and the encoder, and four is enough."""
    cores = usable_cores()
    return max(1, min(4, (cores if cores <= 2 else cores - 1) // workers))


def calm_openmp(threads: int) -> None:
    """Settle OpenMP's pool. Must run before torch is imported: the libraries read these once.

    Threads that spin while they wait were seen to slow a pass 10 to 100 times when another process wants the cores.
    """
    os.environ.update(
        OMP_NUM_THREADS=str(threads), OMP_WAIT_POLICY=OPENMP_WAIT_POLICY, GOMP_SPINCOUNT="0", KMP_BLOCKTIME="0"
    )


def eager_openmp(threads: int) -> None:
    """The same for work that has the machine to itself: threads that spin took a third off a training step."""
    os.environ.update(OMP_NUM_THREADS=str(threads), OMP_WAIT_POLICY="active", GOMP_SPINCOUNT="20000")


def run_worker(line: Connection, factory: EngineFactory, threads: int, log_level: str) -> None:
    """The worker process. Ends when the server hangs up or ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logging.basicConfig(level=log_level.upper(), format="%(asctime)s %(levelname)s %(message)s")
    calm_openmp(threads)
    try:
        _serve(line, factory)
    except (EOFError, OSError):
        log.debug("the server hung up")
    # Taking torch apart takes a second or more, and there is nothing left to save.
    line.close()
    logging.shutdown()
    os._exit(0)


def _serve(line: Connection, factory: EngineFactory) -> None:
    watch = Stopwatch()
    try:
        engine = factory(watch.trace)
        engine.warm_up()
    except Exception as error:
        line.send(_failed(error))
        return
    line.send(Ready(engine.config))

    state: Any = None
    while True:
        order: Order = line.recv()
        try:
            watch.take()
            started_s = time.perf_counter()
            state = _open_or_reset(engine, state, order)
            chunk = engine.step(state, order.controls, order.source_THWC)
            chunk_ms = (time.perf_counter() - started_s) * 1000
            line.send(Made(chunk, chunk_ms, watch.take(), unknown_words(engine, order.controls.prompt)))
        except PipelineError as error:
            line.send(Failed(error))
        except (EOFError, OSError):
            raise
        except Exception as error:
            line.send(_failed(error))
            return  # the stream's memory may be half written: a new process is the only clean one


def unknown_words(engine: EngineLike, prompt: str) -> tuple[str, ...]:
    """Words of the prompt that the model does not know, each once."""
    return tuple(dict.fromkeys(engine.text.unknown(prompt)))


def _open_or_reset(engine: EngineLike, state: Any, order: Order) -> Any:
    if state is None:
        return engine.open(order.controls.seed)
    if order.fresh:
        engine.reset(state, order.controls.seed)
    return state


def _failed(error: Exception) -> Failed:
    if isinstance(error, SPOKEN):
        return Failed(error)
    spoken = memory_short(error) or AppError(
        "internal_error", f"The generator stopped: {type(error).__name__}.", "The server's log says more."
    )
    return Failed(spoken, "".join(traceback.format_exception(error)))


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
