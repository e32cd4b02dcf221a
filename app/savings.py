"""What region caching saves in a stream: the times of its own dense chunks against those of its newest sparse ones.

Measured, never reckoned from the share of tiles. Knows no engine, no page and no clock.
"""

from collections import deque
from dataclasses import dataclass, field
from statistics import median

from pipeline.chunk import Chunk, Controls

FEWEST = 3  # chunks of each, before anything is told


@dataclass
class Savings:
    """dense_ms, sparse_ms: times of the newest chunks of one kind. A chunk of another kind begins anew."""

    dense_ms: deque[float] = field(default_factory=lambda: deque(maxlen=64))
    sparse_ms: deque[float] = field(default_factory=lambda: deque(maxlen=16))
    _kind: tuple[object, ...] = ()

    def took(self, controls: Controls, followed: bool, chunk: Chunk, chunk_ms: float) -> None:
        """A chunk was made. followed: after a source."""
        kind = kind_of(controls, followed)
        if kind != self._kind:
            self._kind = kind
            self.dense_ms.clear()
            self.sparse_ms.clear()
        (self.dense_ms if chunk.active_HW is None else self.sparse_ms).append(chunk_ms)

    @property
    def share(self) -> float | None:
        """How much less time a sparse chunk takes than a dense one, by the medians; below 0 where it takes more. None
        until there are a few of both."""
        if min(len(self.dense_ms), len(self.sparse_ms)) < FEWEST:
            return None
        return 1 - median(self.sparse_ms) / median(self.dense_ms)


def kind_of(controls: Controls, followed: bool) -> tuple[object, ...]:
    """All that a chunk's time hangs on besides its tiles: a source is encoded, and its strength settles the passes."""
    of_source = (controls.strength, controls.structure > 0) if followed else ()
    return followed, controls.steps, controls.lora, *of_source
