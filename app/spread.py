"""Work spread over a few threads under one bar: streams know nothing of each other, so each may have a core of its own.

Two streams side by side, a thread each, take less time than one after the other with two. Knows nothing of the work.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import TypeVar

import torch
from rich.progress import Progress

T = TypeVar("T")
R = TypeVar("R")


class StoppedError(Exception):
    """The others were stopped; raised where one of them says that a chunk is made."""


class Spreader:
    """What `pipeline.training.evaluate.Spread` asks for. threads: for all that is done at the same time."""

    def __init__(self, progress: Progress, threads: int) -> None:
        self.progress, self.threads = progress, threads

    def __call__(
        self, work: Callable[[T, Callable[[], None]], R], items: Sequence[T], chunks: int, text: str
    ) -> list[R]:
        bar, stopped = self.progress.add_task(text, total=chunks), Event()

        def made() -> None:
            if stopped.is_set():
                raise StoppedError
            self.progress.advance(bar)

        workers = max(1, min(self.threads, len(items)))
        if workers == 1:
            return [work(item, made) for item in items]
        torch.set_num_threads(max(1, self.threads // workers))  # threads begin with what is set here
        try:
            with ThreadPoolExecutor(workers) as pool:
                try:
                    return list(pool.map(lambda item: work(item, made), items))
                except BaseException:  # Ctrl-C too: a stream may have minutes to go
                    stopped.set()
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
        finally:
            torch.set_num_threads(self.threads)
