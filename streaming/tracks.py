"""The picture on its way to the viewer: a bounded queue of frames that leave at a steady rate.

Knows frames, their rate and an opaque tag. Does not know the codec, the network or what a tag means.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

from aiortc.mediastreams import MediaStreamError, MediaStreamTrack

from streaming.frames import Frame, to_video
from streaming.pacer import Pacer


class OutgoingTrack(MediaStreamTrack):  # type: ignore[misc]
    """One producer puts, the connection's sender receives; all calls are made on one event loop.

    on_shown: called with the tag of a put as its first frame leaves for the encoder.
    frames_shown, frames_dropped: totals since the track was made.
    """

    kind = "video"

    def __init__(self, fps: float, buffer_frames: int, pacer: Pacer | None = None) -> None:
        super().__init__()
        if buffer_frames < 1:
            raise ValueError(f"buffer_frames must be at least 1, not {buffer_frames}")
        self.buffer_frames = buffer_frames
        self.on_shown: Callable[[Any], None] | None = None
        self.frames_shown = 0
        self.frames_dropped = 0
        self._fps = fps
        self._pacer = pacer or Pacer(fps)
        # A tag sits in a tuple, so that None is a tag like any other.
        self._frames: deque[tuple[Frame, tuple[Any] | None]] = deque()
        self._filled = asyncio.Event()
        self._room = asyncio.Event()
        self._waiting_frames = 0
        self._flushes = 0

    @property
    def queue_frames(self) -> int:
        return len(self._frames)

    async def put(self, frames_THWC: Frame, tag: Any = None) -> None:
        """Queue frames once all of them fit. A flush meanwhile drops them: they are as old as the queued ones.

        More frames than the buffer holds wait until it is empty. A stopped track swallows frames at its rate, so
        that a producer that has not heard of the end does not spin.
        """
        count = len(frames_THWC)
        flushes = self._flushes
        self._waiting_frames += count
        try:
            while self._frames and len(self._frames) + count > self.buffer_frames and flushes == self._flushes:
                self._room.clear()
                await self._room.wait()
        finally:
            if flushes == self._flushes:
                self._waiting_frames -= count
        if flushes != self._flushes:
            return
        if self.readyState != "live":
            self.frames_dropped += count
            await asyncio.sleep(count / self._fps)
            return
        for index, frame in enumerate(frames_THWC):
            self._frames.append((frame, (tag,) if index == 0 else None))
        self._filled.set()

    def flush(self) -> int:
        """Drop all that has not left for the encoder, a waiting put included; return the number of frames."""
        dropped = len(self._frames) + self._waiting_frames
        self.frames_dropped += dropped
        self._frames.clear()
        self._waiting_frames = 0
        self._flushes += 1
        self._room.set()
        return dropped

    async def recv(self) -> Any:
        """The next frame when it is due. With none ready it waits, and the viewer keeps the last picture."""
        while True:
            while not self._frames:
                self._check_live()
                self._filled.clear()
                await self._filled.wait()
            pts = await self._pacer.wait()
            self._check_live()
            # A flush may have come while the frame waited for its time.
            if self._frames:
                break
        frame, tag = self._frames.popleft()
        self._room.set()
        self.frames_shown += 1
        if tag is not None and self.on_shown is not None:
            self.on_shown(tag[0])
        return to_video(frame, pts)

    def stop(self) -> None:
        super().stop()
        self.flush()
        self._filled.set()

    def _check_live(self) -> None:
        if self.readyState != "live":
            raise MediaStreamError
