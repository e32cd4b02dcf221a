"""The viewer's camera: decoded frames become RGB pictures, the newest one wins.

Knows a remote track. Does not know the connection it belongs to, nor what the pictures are for.
"""

import asyncio
from collections.abc import Callable
from typing import Any

from aiortc.mediastreams import MediaStreamError

from streaming.frames import Frame, fit, to_rgb

OnFrame = Callable[[Frame, float, tuple[int, int]], None]


async def read_camera(track: Any, on_frame: OnFrame, size: tuple[int, int] | None = None) -> None:
    """Call on_frame(rgb_HWC, pts_s, raw_size) for the newest frame, again and again, until the track ends.

    The track's own queue has no bound, so it is emptied at once; a frame that is still waiting for its
    conversion is replaced. size: (width, height) that pictures are fitted to. raw_size: the one they came in.
    """
    newest: asyncio.Queue[Any] = asyncio.Queue(maxsize=1)
    async with asyncio.TaskGroup() as group:
        converter = group.create_task(_convert(newest, on_frame, size))
        try:
            while True:
                frame = await track.recv()
                if newest.full():
                    newest.get_nowait()
                newest.put_nowait(frame)
        except MediaStreamError:
            converter.cancel()


async def _convert(newest: asyncio.Queue[Any], on_frame: OnFrame, size: tuple[int, int] | None) -> None:
    while True:
        frame = await newest.get()
        # A 720p frame takes several milliseconds, which the event loop cannot spare.
        picture_HWC = await asyncio.to_thread(_picture, frame, size)
        on_frame(picture_HWC, float(frame.time), (frame.width, frame.height))


def _picture(frame: Any, size: tuple[int, int] | None) -> Frame:
    rgb_HWC = to_rgb(frame)
    return rgb_HWC if size is None else fit(rgb_HWC, *size)
