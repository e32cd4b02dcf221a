"""A camera in a stream: its newest pictures are the next chunk's source; it may come late, stop and come back."""

import numpy as np

from tests.app.fakes import CONFIG
from tests.app.scene import Scene, scene

VGA, SMALL = (640, 480), (320, 240)


def _camera_frame(value: int) -> np.ndarray:
    return np.full((CONFIG.height, CONFIG.width, 3), value, np.uint8)


async def test_fresh_camera_frames_become_the_source_of_the_next_chunk(live: Scene) -> None:
    await live.say("controls", id=1, camera=True)
    live.peer.on_frame(_camera_frame(77), 0.0, VGA)
    await live.worker.make()
    source_THWC = live.worker.orders[-1].source_THWC

    assert source_THWC is not None
    assert source_THWC.shape == (CONFIG.frames_per_chunk, CONFIG.height, CONFIG.width, 3)
    assert source_THWC[-1, 0, 0].tolist() == [77, 77, 77]


async def test_a_camera_that_is_switched_off_is_no_source(live: Scene) -> None:
    live.peer.on_frame(_camera_frame(77), 0.0, VGA)
    await live.worker.make()

    assert live.worker.orders[-1].source_THWC is None


async def test_a_camera_that_stops_is_said_once_and_the_stream_goes_on_from_the_prompt(live: Scene) -> None:
    await live.say("controls", id=1, camera=True)
    live.peer.on_frame(_camera_frame(77), 0.0, VGA)
    await live.clock.advance(2.5)
    for _ in range(3):
        await live.worker.make()
        live.track.show()

    assert live.page.codes == ["camera_stopped"]
    assert not live.page.of("error")[0]["fatal"]
    assert live.worker.orders[-1].source_THWC is None
    assert live.page.states[-1] == "live"

    live.peer.on_frame(_camera_frame(77), 9.0, VGA)
    await live.worker.make()
    live.track.show()
    assert live.worker.orders[-1].source_THWC is not None


async def test_a_camera_is_not_missed_before_media_is_there() -> None:
    async with scene() as made:
        await made.say("controls", id=1, camera=True)
        await made.say("offer", sdp="v=0")
        await made.clock.advance(5)
        await made.worker.make()
        assert made.page.codes == []
        made.peer.on_state("connected")
        await made.clock.advance(2.5)
        made.track.show()
        await made.worker.make()
        assert made.page.codes == ["camera_stopped"]


async def test_a_camera_that_changes_its_size_is_another_source_of_which_nothing_older_is_seen(live: Scene) -> None:
    await live.say("controls", id=1, camera=True)
    live.peer.on_frame(_camera_frame(77), 0.0, VGA)
    live.peer.on_frame(_camera_frame(77), 0.1, VGA)
    await live.worker.make()
    first = live.worker.orders[-1]
    live.peer.on_frame(_camera_frame(11), 0.2, SMALL)
    live.track.show()
    await live.worker.make()
    second = live.worker.orders[-1]

    assert first.source_THWC is not None and second.source_THWC is not None
    assert (second.source_THWC == 11).all()
    assert second.controls.source == first.controls.source + 1
    assert second.controls.epoch == first.controls.epoch
    assert not second.fresh
