import asyncio
from typing import Any

import numpy as np
from aiortc.mediastreams import MediaStreamError

from streaming.camera import read_camera
from streaming.frames import to_video


class Burst:
    """A remote track whose frames have piled up; it ends when told."""

    def __init__(self, count: int) -> None:
        self.frames = [to_video(np.full((8, 8, 3), value, np.uint8), pts=value * 3000) for value in range(count)]
        self.ended = asyncio.Event()

    async def recv(self) -> Any:
        if self.frames:
            return self.frames.pop(0)
        await self.ended.wait()
        raise MediaStreamError


async def test_of_frames_that_piled_up_only_the_newest_is_used() -> None:
    track, used = Burst(100), []
    reading = asyncio.create_task(read_camera(track, lambda rgb_HWC, pts_s, _: used.append((rgb_HWC, pts_s))))
    async with asyncio.timeout(60):
        while not used:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        track.ended.set()
        await reading
    assert [(int(rgb_HWC[0, 0, 0]), round(pts_s * 30)) for rgb_HWC, pts_s in used] == [(99, 99)]


async def test_reading_ends_with_the_track_even_while_nothing_came() -> None:
    track = Burst(0)
    track.ended.set()
    async with asyncio.timeout(60):
        await read_camera(track, lambda *_: None)
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_fitted_picture_comes_with_the_size_that_it_had() -> None:
    track, sizes = Burst(0), []
    track.frames = [to_video(np.zeros((24, 40, 3), np.uint8), pts=0)]
    reading = asyncio.create_task(
        read_camera(track, lambda rgb_HWC, _, raw_size: sizes.append((rgb_HWC.shape, raw_size)), (16, 8))
    )
    async with asyncio.timeout(60):
        while not sizes:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        track.ended.set()
        await reading
    assert sizes == [((8, 16, 3), (40, 24))]
