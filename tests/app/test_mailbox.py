"""What passes between a session and its worker."""

import asyncio
import multiprocessing

import numpy as np
import pytest

from app.errors import AppError, WorkerLostError
from app.mailbox import Failed, Inbox, Line, Made, Order, Outbox
from pipeline.chunk import Controls
from pipeline.errors import PipelineError
from streaming.errors import WireError
from tests.app.fakes import CONFIG, paint, running, settle


def _made(index: int, epoch: int = 0) -> Made:
    return Made(paint(Controls("red", epoch=epoch), index, None), 1.0, {})


def test_the_inbox_gives_the_newest_controls_and_forgets_those_in_between() -> None:
    inbox = Inbox(Controls("one"), lambda: None)
    inbox.post(prompt="two")
    inbox.post(prompt="three", seed=9)

    assert inbox.snapshot().controls == Controls("three", seed=9)


def test_the_source_is_taken_when_the_snapshot_is() -> None:
    frames = [np.zeros((1, 2, 2, 3), np.uint8)]
    inbox = Inbox(Controls("one"), lambda: frames[-1])
    frames.append(np.ones((1, 2, 2, 3), np.uint8))

    assert inbox.snapshot().source_THWC is frames[1]


def test_a_restart_is_asked_for_once_whatever_is_posted_after_it() -> None:
    inbox = Inbox(Controls("one"), lambda: None)
    assert inbox.snapshot().fresh
    inbox.post(fresh=True)
    inbox.post(prompt="two")

    assert [inbox.snapshot().fresh, inbox.snapshot().fresh] == [True, False]


def test_a_stream_that_begins_with_a_picture_takes_it_once_for_each_start() -> None:
    camera, still = np.zeros((1, 2, 2, 3), np.uint8), np.ones((1, 2, 2, 3), np.uint8)
    inbox = Inbox(Controls("one", strength=0.7), lambda: camera)
    inbox.still_THWC = still
    orders = [inbox.snapshot(), inbox.snapshot()]
    inbox.restart()
    orders.append(inbox.snapshot())

    assert [order.source_THWC is still for order in orders] == [True, False, True]
    assert [order.controls.strength for order in orders] == [0.0, 0.7, 0.0]
    assert [order.fresh for order in orders] == [True, False, True]


async def test_no_slot_can_be_reserved_until_one_is_free() -> None:
    outbox = Outbox(1)
    await outbox.reserve()
    async with running(outbox.reserve()) as second:
        assert not second.done()
        outbox.put(_made(0), 0.0)
        await outbox.take()
        await settle()
        assert not second.done()
        outbox.free()
        await settle()
        assert second.done()


async def test_chunks_leave_in_order_and_whoever_takes_waits_for_them() -> None:
    outbox = Outbox(2)

    async def take_two() -> list[int]:
        return [(await outbox.take())[0].chunk.index for _ in range(2)]

    async with running(take_two()) as taker:
        outbox.put(_made(0), 0.0)
        await settle()
        outbox.put(_made(1), 0.0)
        assert await taker == [0, 1]


async def test_chunks_of_an_older_epoch_are_dropped_and_free_their_slots() -> None:
    outbox = Outbox(2)
    for epoch in (0, 1):
        await outbox.reserve()
        outbox.put(_made(epoch, epoch), 0.0)

    assert outbox.drop_older(1) == CONFIG.frames_per_chunk
    await asyncio.wait_for(outbox.reserve(), 1)
    made, _ = await outbox.take()
    assert made.chunk.epoch == 1


@pytest.mark.parametrize("kind", [AppError, PipelineError, WireError])
async def test_errors_cross_the_line_whole(kind: type[AppError | PipelineError | WireError]) -> None:
    ours, theirs = multiprocessing.Pipe()
    line = Line(ours)
    theirs.send(Failed(kind("some_code", "One sentence.", "Do this.")))
    reply = await line.exchange(Order(Controls("red")))
    line.close()

    assert isinstance(reply, Failed)
    assert type(reply.error) is kind
    assert (reply.error.code, reply.error.message, reply.error.remedy) == ("some_code", "One sentence.", "Do this.")


async def test_a_worker_that_hangs_up_is_lost() -> None:
    ours, theirs = multiprocessing.Pipe()
    line = Line(ours)
    theirs.close()
    with pytest.raises(WorkerLostError):
        await line.exchange(Order(Controls("red")))
    line.close()
