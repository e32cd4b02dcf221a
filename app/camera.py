"""The viewer's camera as a source: the newest frames while they are fresh, nothing once they stop.

Knows no connection and no engine.
"""

from collections.abc import Callable

import numpy as np

from pipeline.config import ModelConfig
from streaming.webcam import NewestFrames

FRESH_S = 2.0
CAPACITY_FRAMES = 32


class Camera:
    """on_stopped: called once each time the frames of a camera that is switched on stay away, once media is there.
    on_resized: called where its pictures change the size that they come in, before the first of them is used."""

    def __init__(
        self,
        config: ModelConfig,
        clock: Callable[[], float],
        on_stopped: Callable[[], None],
        on_resized: Callable[[], None],
    ) -> None:
        self._config = config
        self._clock = clock
        self._on_stopped = on_stopped
        self._on_resized = on_resized
        self._raw_size: tuple[int, int] | None = None
        self._frames = NewestFrames(CAPACITY_FRAMES, clock)
        self._expected_s: float | None = None  # since when frames should come; None: there is no media yet
        self._told = False
        self.on = False
        self.frames_seen = 0

    def switch(self, on: bool) -> None:
        self.on = on
        if self._expected_s is not None:
            self._expected_s = self._clock()
        self._told = False
        self._frames.clear()

    def connected(self) -> None:
        """Media flows from now on: before this no frame can be missed."""
        self._expected_s = self._clock()

    def take(self, frame_HWC: np.ndarray, pts_s: float, raw_size: tuple[int, int]) -> None:
        """A frame of the model's size, and the (width, height) that it came in."""
        self.frames_seen += 1
        if self.on:
            self._told = False
            if self._raw_size not in (None, raw_size):
                self._frames.clear()  # what was fitted from another size shows another part of the scene
                self._on_resized()
            self._raw_size = raw_size
            self._frames.put(frame_HWC, pts_s)

    def window(self) -> np.ndarray | None:
        """The source of the next chunk, or None: the camera is off, not yet there, or has stopped."""
        if not self.on:
            return None
        now_s = self._clock()
        if self._frames.age_s(now_s) < FRESH_S:
            return self._frames.window(self._config.frames_per_chunk, self._config.fps)
        missed = self._expected_s is not None and now_s - self._expected_s >= FRESH_S
        if missed and not self._told:
            self._told = True
            self._on_stopped()
        return None
