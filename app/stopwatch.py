"""Measures the generator's stages; it is the clock that the generator itself does not have."""

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter


class Stopwatch:
    """Pass `trace` to the engine; read and clear `stages_ms` after each chunk."""

    def __init__(self) -> None:
        self.stages_ms: dict[str, float] = {}

    @contextmanager
    def trace(self, stage: str) -> Iterator[None]:
        started_s = perf_counter()
        try:
            yield
        finally:
            spent_ms = (perf_counter() - started_s) * 1000
            self.stages_ms[stage] = self.stages_ms.get(stage, 0.0) + spent_ms

    def take(self) -> dict[str, float]:
        """The times since the last take."""
        taken, self.stages_ms = self.stages_ms, {}
        return taken
