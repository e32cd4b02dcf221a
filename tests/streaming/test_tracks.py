import asyncio

import numpy as np
import pytest
from aiortc.mediastreams import MediaStreamError

from streaming.frames import to_rgb
from streaming.pacer import Pacer
from streaming.tracks import OutgoingTrack


def chunk(*values: int) -> np.ndarray:
    return np.stack([np.full((16, 16, 3), value, np.uint8) for value in values])


def make_track(buffer_frames: int = 4) -> OutgoingTrack:
    async def no_sleep(duration_s: float) -> None:
        await asyncio.sleep(0)

    return OutgoingTrack(16, buffer_frames, Pacer(16, clock=lambda: 0.0, sleep=no_sleep))


async def shown(track: OutgoingTrack) -> int:
    frame = await track.recv()
    return int(to_rgb(frame)[0, 0, 0])


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_frames_leave_in_order_with_whole_periods_of_media_time() -> None:
    track = make_track()
    await track.put(chunk(1, 2, 3))
    frames = [await track.recv() for _ in range(3)]
    assert [int(to_rgb(frame)[0, 0, 0]) for frame in frames] == [1, 2, 3]
    assert [frame.pts for frame in frames] == [0, 5625, 11250]
    assert track.frames_shown == 3


async def test_a_put_waits_until_all_its_frames_fit() -> None:
    track = make_track(buffer_frames=4)
    await track.put(chunk(1, 2, 3))
    waiting = asyncio.create_task(track.put(chunk(4, 5)))
    await settle()
    assert (track.queue_frames, waiting.done()) == (3, False)
    assert await shown(track) == 1
    await waiting
    assert [await shown(track) for _ in range(4)] == [2, 3, 4, 5]


async def test_a_put_larger_than_the_buffer_goes_in_when_it_is_empty() -> None:
    track = make_track(buffer_frames=2)
    await track.put(chunk(1, 2, 3))
    assert [await shown(track) for _ in range(3)] == [1, 2, 3]


async def test_the_tag_is_told_as_the_first_frame_of_its_put_leaves() -> None:
    track = make_track()
    told: list[str | None] = []
    track.on_shown = told.append
    await track.put(chunk(1, 2), "first")
    await track.put(chunk(3), None)
    assert told == []
    await track.recv()
    assert told == ["first"]
    await track.recv()
    assert told == ["first"]
    await track.recv()
    assert told == ["first", None]


async def test_a_flush_drops_what_is_queued_and_what_waits_to_be() -> None:
    track = make_track(buffer_frames=4)
    await track.put(chunk(1, 2, 3))
    waiting = asyncio.create_task(track.put(chunk(4, 5)))
    await settle()
    assert track.flush() == 5
    await waiting
    await track.put(chunk(6))
    assert await shown(track) == 6
    assert track.frames_dropped == 5
    assert track.flush() == 0


async def test_a_frame_that_waits_for_its_time_can_still_be_flushed() -> None:
    due = asyncio.Event()

    async def sleep(duration_s: float) -> None:
        await due.wait()

    track = OutgoingTrack(16, 4, Pacer(16, clock=lambda: 0.0, sleep=sleep))
    await track.put(chunk(1, 2))
    assert await shown(track) == 1
    next_shown = asyncio.create_task(shown(track))
    await settle()
    assert track.flush() == 1
    await track.put(chunk(3))
    due.set()
    assert await next_shown == 3


async def test_with_nothing_to_show_the_track_waits() -> None:
    track = make_track()
    next_shown = asyncio.create_task(shown(track))
    await settle()
    assert not next_shown.done()
    await track.put(chunk(7))
    assert await next_shown == 7


async def test_a_cancelled_put_leaves_nothing_behind() -> None:
    track = make_track(buffer_frames=1)
    await track.put(chunk(1))
    waiting = asyncio.create_task(track.put(chunk(2)))
    await settle()
    waiting.cancel()
    await settle()
    assert track.flush() == 1


async def test_stopping_ends_both_sides() -> None:
    track = make_track(buffer_frames=1)
    await track.put(chunk(1))
    putting = asyncio.create_task(track.put(chunk(2)))
    await settle()
    track.stop()
    await putting
    with pytest.raises(MediaStreamError):
        await track.recv()
    await track.put(chunk(3))
    assert track.frames_dropped == 3


async def test_stopping_wakes_a_waiting_receiver() -> None:
    track = make_track()
    receiving = asyncio.create_task(track.recv())
    await settle()
    track.stop()
    with pytest.raises(MediaStreamError):
        await receiving
