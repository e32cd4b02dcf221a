import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

from streaming.errors import WireError
from streaming.peer import Peer
from tests.streaming.viewer import BLUE, FPS, GREEN, RED, Camera, Viewer, plain, until

pytestmark = pytest.mark.usefixtures("tuned", "no_task_left")


class Server:
    """Our side with its callbacks written down."""

    def __init__(self, **options: Any) -> None:
        self.frames: list[tuple[np.ndarray, float]] = []
        self.states: list[str] = []
        self.peer = Peer(
            on_frame=lambda rgb_HWC, pts_s, _: self.frames.append((rgb_HWC, pts_s)),
            on_state=self.states.append,
            fps=FPS,
            **options,
        )


@pytest.fixture
async def closing() -> AsyncIterator[list[Any]]:
    things: list[Any] = []
    yield things
    for thing in things:
        await thing.close()


async def joined(closing: list[Any], codec: str | None = None, camera: Camera | None = None, **options: Any) -> Any:
    server, viewer = Server(**options), Viewer(codec, camera)
    closing += [server.peer, viewer]
    await viewer.accept(await server.peer.answer(await viewer.offer()))
    return server, viewer


async def refusal(server: Server, offer_sdp: str) -> str:
    with pytest.raises(WireError) as caught:
        await server.peer.answer(offer_sdp)
    assert caught.value.remedy
    return caught.value.code


@pytest.mark.parametrize("codec", ["video/H264", "video/VP8"])
async def test_frames_arrive_move_and_keep_their_colours(codec: str, closing: list[Any]) -> None:
    server, viewer = await joined(closing, codec)
    for colour in (RED, GREEN, BLUE, BLUE):
        await server.peer.track.put(plain(colour, 8))
    await until(lambda: len(viewer.seen) >= 24)
    for index, colour in ((6, RED), (14, GREEN), (22, BLUE)):
        assert viewer.colours()[index] == pytest.approx(colour, abs=12)
    gaps_s = np.diff([moment_s for moment_s, _ in viewer.seen])
    assert gaps_s.min() >= 1 / FPS - 1e-3


async def test_a_moving_square_is_where_it_was_drawn(closing: list[Any]) -> None:
    server, viewer = await joined(closing)
    frames_THWC = plain((20, 20, 20), 16)
    for index, frame_HWC in enumerate(frames_THWC):
        frame_HWC[32:64, index * 8 : index * 8 + 32] = 230
    await server.peer.track.put(frames_THWC)
    await server.peer.track.put(plain(RED))
    await until(lambda: len(viewer.seen) >= 16)
    centres = [np.nonzero(frame_HWC[48, :, 0] > 128)[0].mean() for _, frame_HWC in viewer.seen[:16]]
    assert centres == pytest.approx([index * 8 + 15.5 for index in range(16)], abs=2)


@pytest.mark.parametrize("codec", ["video/H264", "video/VP8"])
async def test_camera_frames_reach_the_callback_fitted_and_in_time(codec: str, closing: list[Any]) -> None:
    camera = Camera(width=160, height=120)
    server, _ = await joined(closing, codec, camera, camera_size=(64, 32))
    await until(lambda: len(server.frames) >= 5)
    camera.frame_HWC = np.full_like(camera.frame_HWC, GREEN)
    await until(lambda: abs(server.frames[-1][0][16, 32].astype(int) - GREEN).max() < 12)
    assert server.frames[0][0].shape == (32, 64, 3)
    assert server.frames[0][0][16, 32].astype(int) == pytest.approx(BLUE, abs=12)
    assert np.diff([pts_s for _, pts_s in server.frames]).min() > 0


async def test_a_camera_attached_later_needs_no_new_offer(closing: list[Any]) -> None:
    server, viewer = await joined(closing)
    await server.peer.track.put(plain(RED, 3))
    await until(lambda: len(viewer.seen) >= 1)
    assert server.frames == []
    viewer.connection.getSenders()[0].replaceTrack(Camera())
    await until(lambda: len(server.frames) >= 2)


async def test_flushed_frames_are_never_seen(closing: list[Any]) -> None:
    server, viewer = await joined(closing, buffer_frames=32)
    await server.peer.track.put(plain(RED, 32))
    await until(lambda: len(viewer.seen) >= 2)
    dropped = server.peer.track.flush()
    await server.peer.track.put(plain(GREEN, 4))
    await until(lambda: bool(abs(viewer.colours()[-1] - GREEN).max() < 12))
    assert dropped > 0
    assert server.peer.track.frames_dropped == dropped
    assert len(viewer.seen) <= 36 - dropped


@pytest.mark.parametrize("codec", ["video/H264", "video/VP8"])
async def test_a_viewer_that_lost_the_picture_gets_a_whole_one(codec: str, closing: list[Any]) -> None:
    server, viewer = await joined(closing, codec)
    await server.peer.track.put(plain(RED, 4))
    await until(lambda: len(viewer.seen) >= 3)
    receiver = viewer.connection.getReceivers()[0]
    whole = whole_pictures(receiver)
    await receiver._send_rtcp_pli(server.peer._sender._ssrc)
    await until(lambda: server.peer._sender._RTCRtpSender__force_keyframe)
    await server.peer.track.put(plain(GREEN, 4))
    await until(lambda: len(viewer.seen) >= 7)
    # The first of them was sent before the request; it only waited for the next to show that it was complete.
    assert whole == [False, True, False, False]
    assert viewer.colours()[6] == pytest.approx(GREEN, abs=12)


def whole_pictures(receiver: Any) -> list[bool]:
    """Whether each encoded frame that arrives from now on can be decoded by itself."""
    found: list[bool] = []
    frames = receiver._RTCRtpReceiver__decoder_queue
    put = frames.put

    def note(item: Any) -> None:
        if item is not None:
            codec, frame = item
            # An H.264 picture that stands alone brings its parameter sets (type 7); bit 0 of VP8 says "depends".
            found.append(frame.data[4] & 0x1F == 7 if codec.name == "H264" else frame.data[0] & 1 == 0)
        put(item)

    frames.put = note
    return found


async def test_states_are_told_once_each(closing: list[Any]) -> None:
    server, viewer = await joined(closing)
    await until(lambda: "connected" in server.states)
    await viewer.close()
    await until(lambda: "closed" in server.states)
    await server.peer.close()
    assert server.states == ["connecting", "connected", "closed"]


async def test_closing_twice_or_before_the_offer_is_fine() -> None:
    server = Server()
    await asyncio.gather(server.peer.close(), server.peer.close())
    await server.peer.close()
    assert server.states == ["closed"]
    assert await refusal(server, "v=0") == "offer_unexpected"


async def test_closing_while_connecting_leaves_no_task() -> None:
    server, viewer = Server(), Viewer()
    await server.peer.answer(await viewer.offer())
    await until(lambda: "connecting" in server.states)
    await server.peer.close()
    await viewer.close()
    assert server.states[-1] == "closed"


@pytest.mark.parametrize("turns", range(0, 12, 2))
async def test_closing_while_answering_leaves_no_task(turns: int) -> None:
    server, viewer = Server(), Viewer()
    answering = asyncio.create_task(server.peer.answer(await viewer.offer()))
    for _ in range(turns):
        await asyncio.sleep(0)
    await server.peer.close()
    [outcome] = await asyncio.gather(answering, return_exceptions=True)
    assert isinstance(outcome, WireError | str)
    await viewer.close()


async def test_the_cheaper_codec_is_chosen_when_both_sides_have_both(closing: list[Any]) -> None:
    server, viewer = Server(), Viewer()
    closing += [server.peer, viewer]
    answer_sdp = await server.peer.answer(await viewer.offer())
    assert answer_sdp.index("VP8/90000") < answer_sdp.index("H264/90000")


async def test_a_trickled_candidate_connects_an_offer_that_named_none(closing: list[Any]) -> None:
    server, viewer = Server(), Viewer()
    closing += [server.peer, viewer]
    lines = (await viewer.offer()).splitlines()
    candidates = [line.removeprefix("a=") for line in lines if line.startswith("a=candidate:")]
    bare = [line for line in lines if not line.startswith(("a=candidate:", "a=end-of-candidates"))]
    first, *rest = [{"candidate": line, "sdpMid": "0", "sdpMLineIndex": 0} for line in candidates]
    await server.peer.add_candidate(first)
    answer_sdp = await server.peer.answer("\r\n".join(bare) + "\r\n")
    for candidate in [*rest, {"candidate": "", "sdpMid": "0"}, None]:
        await server.peer.add_candidate(candidate)
    await viewer.accept(answer_sdp)
    await until(lambda: "connected" in server.states)


async def test_an_offer_that_cannot_be_used_is_explained_and_a_better_one_still_works(closing: list[Any]) -> None:
    server, viewer = Server(), Viewer()
    closing += [server.peer, viewer]
    good = await viewer.offer()
    for bad in ("", "nonsense", "v=0\r\nm=video x\r\n", good.replace("a=mid:0", "a=fingerprint:x")):
        assert await refusal(server, bad) in ("sdp_invalid", "sdp_without_video")
    assert await refusal(server, good.replace("m=video", "m=audio")) == "sdp_without_video"
    assert await refusal(server, good.replace("a=sendrecv", "a=inactive")) == "sdp_without_video"
    assert await refusal(server, good.replace("H264/", "AV1/").replace("VP8/", "VP9/")) == "no_common_codec"
    assert await refusal(server, good.replace("a=ice-ufrag", "a=other")) == "sdp_invalid"
    await viewer.accept(await server.peer.answer(good))
    await until(lambda: "connected" in server.states)
    assert await refusal(server, good) == "offer_unexpected"


async def test_sound_data_and_a_second_picture_in_an_offer_are_left_aside(closing: list[Any]) -> None:
    server, viewer = Server(), Viewer()
    closing += [server.peer, viewer]
    viewer.connection.addTransceiver("audio")
    viewer.connection.addTransceiver(Camera(), direction="sendonly")
    viewer.connection.createDataChannel("notes")
    answer_sdp = await server.peer.answer(await viewer.offer())
    assert answer_sdp.count("a=inactive") == 2
    await viewer.accept(answer_sdp)
    await server.peer.track.put(plain(RED, 3))
    await until(lambda: len(viewer.seen) >= 2)
    assert server.frames == []


async def test_a_damaged_offer_raises_nothing_but_wire_errors() -> None:
    viewer = Viewer()
    good = await viewer.offer()
    lines = good.splitlines()
    for index in range(len(lines)):
        for damaged in (
            [*lines[:index], *lines[index + 1 :]],
            [*lines[:index], lines[index][:-3], *lines[index + 1 :]],
        ):
            server = Server()
            with suppress(WireError):
                await server.peer.answer("\r\n".join(damaged) + "\r\n")
            await server.peer.close()
    await viewer.close()


@pytest.mark.parametrize(
    "candidate",
    [
        {"candidate": "nonsense", "sdpMid": "0"},
        {"candidate": "candidate:1 1 udp many 127.0.0.1 9 typ host", "sdpMid": "0"},
        {"candidate": "candidate:1 1 udp 1 127.0.0.1 99999 typ host", "sdpMid": "0"},
        {"candidate": "candidate:1 1 udp 1 127.0.0.1 9 typ host"},
        {"candidate": 5, "sdpMid": "0"},
    ],
)
async def test_a_candidate_that_cannot_be_read_is_refused(candidate: dict[str, Any]) -> None:
    server = Server()
    with pytest.raises(WireError) as caught:
        await server.peer.add_candidate(candidate)
    assert caught.value.code == "candidate_invalid"
    await server.peer.close()
