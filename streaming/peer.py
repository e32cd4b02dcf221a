"""One viewer's WebRTC connection: our picture goes out, the camera's frames come in.

Knows session descriptions, ICE candidates and tracks. Does not know how those messages travel, nor what the
frames show.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

from aiortc import RTCConfiguration, RTCIceServer, RTCPeerConnection, RTCRtpSender, RTCSessionDescription
from aiortc.exceptions import OperationError
from aiortc.sdp import SessionDescription, candidate_from_sdp

from streaming.camera import OnFrame, read_camera
from streaming.errors import WireError
from streaming.tracks import OutgoingTrack

# At equal quality libvpx takes a quarter to a half of the time of aiortc's x264 settings (2 ms against 4 to 7 for a
# 320x192 frame), and the generator wants the same cores. Each is taken when the browser has no other.
CODECS = ("video/VP8", "video/H264", "video/rtx")
CANDIDATE_LIMIT = 64

_log = logging.getLogger(__name__)


class Peer:
    """Answers one offer, then lives until close().

    on_frame(rgb_HWC, pts_s, raw_size): a camera frame, and the (width, height) that it came in; when they come faster
    than they are used, the newest wins.
    on_state(state): `connecting`, `connected`, `failed` or `closed`, each time it changes.
    ice_servers: in the browser's words, {"urls": ..., "username": ..., "credential": ...}.
    camera_size: (width, height) that camera frames are fitted to; None leaves them as they come.
    Every call and callback happens on one event loop.
    """

    def __init__(
        self,
        *,
        on_frame: OnFrame,
        on_state: Callable[[str], None],
        fps: float,
        ice_servers: Sequence[Mapping[str, Any]] = (),
        buffer_frames: int = 16,
        camera_size: tuple[int, int] | None = None,
    ) -> None:
        self.track = OutgoingTrack(fps, buffer_frames)
        self._on_frame = on_frame
        self._on_state = on_state
        self._configuration = RTCConfiguration(iceServers=[RTCIceServer(**server) for server in ice_servers])
        self._camera_size = camera_size
        self._connection: Any = None
        self._sender: Any = None
        self._state = "new"
        self._candidates: list[Any] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._answering: asyncio.Task[str] | None = None
        self._closing: asyncio.Task[None] | None = None

    async def answer(self, offer_sdp: str) -> str:
        """Our answer, with all our ICE candidates in it.

        Raises WireError (`sdp_invalid`, `sdp_without_video`, `no_common_codec`, `offer_unexpected`). After an
        offer that cannot be used the peer waits for a better one.
        """
        busy = self._answering is not None and not self._answering.done()
        if busy or self._connection is not None or self._closing is not None:
            raise WireError("offer_unexpected", "This connection already had its offer.", "Connect again.")
        _check_offer(offer_sdp)
        # Sockets that are being gathered would leak if this were cut short, so it runs to its end, even when the
        # caller is cancelled; close() waits for it.
        self._answering = asyncio.create_task(self._answer(offer_sdp))
        return await asyncio.shield(self._answering)

    async def add_candidate(self, candidate: Mapping[str, Any] | None) -> None:
        """Take one of the browser's ICE candidates, before or after its offer; None ends them.

        Raises WireError (`candidate_invalid`).
        """
        parsed = _read_candidate(candidate)
        # The end is not passed on: the browser's checks may still reveal an address that it did not name,
        # and a connection that never comes about is given up after a while.
        if parsed is None:
            return
        if len(self._candidates) >= CANDIDATE_LIMIT:
            raise WireError("candidate_invalid", "There are too many ICE candidates.", "Send fewer.")
        self._candidates.append(parsed)
        if self._sender is not None:
            self._use_candidate(parsed)

    async def close(self) -> None:
        """End the connection and all its tasks. May be called at any time and any number of times."""
        if self._closing is None:
            self._closing = asyncio.create_task(self._close())
        await asyncio.shield(self._closing)

    async def _answer(self, offer_sdp: str) -> str:
        connection = self._connection = RTCPeerConnection(self._configuration)
        connection.on("connectionstatechange", self._follow_state)
        try:
            return await self._negotiate(connection, offer_sdp)
        except BaseException:
            self._connection = None
            connection.remove_all_listeners()
            await connection.close()
            raise

    async def _negotiate(self, connection: Any, offer_sdp: str) -> str:
        transceiver = connection.addTransceiver(self.track, direction="sendrecv")
        known = RTCRtpSender.getCapabilities("video").codecs
        transceiver.setCodecPreferences([c for name in CODECS for c in known if c.mimeType == name])
        try:
            await connection.setRemoteDescription(RTCSessionDescription(offer_sdp, "offer"))
            for other in connection.getTransceivers():
                # Nobody would read its frames, and their queue has no bound.
                if other is not transceiver:
                    other.direction = "inactive"
            answer = await connection.createAnswer()
        except OperationError:
            raise WireError(
                "no_common_codec", "The offer has neither H.264 nor VP8 video.", "Use a browser with one of them."
            ) from None
        except (ValueError, KeyError, AttributeError) as error:
            raise _sdp_invalid() from error
        await connection.setLocalDescription(answer)
        if self._closing is not None:
            raise WireError("offer_unexpected", "The connection was closed.", "Connect again.")
        self._sender = transceiver.sender
        if transceiver.receiver.track is not None:
            self._spawn(read_camera(transceiver.receiver.track, self._on_frame, self._camera_size))
        for candidate in self._candidates:
            self._use_candidate(candidate)
        answer_sdp: str = connection.localDescription.sdp
        return answer_sdp

    def _use_candidate(self, candidate: Any) -> None:
        # A browser may hide its address behind an mDNS name, which takes a second to find or give up.
        self._spawn(self._connection.addIceCandidate(candidate))

    def _follow_state(self) -> None:
        if self._connection is not None:
            self._tell(self._connection.connectionState)

    def _tell(self, state: str) -> None:
        if state != self._state and self._state != "closed":
            self._state = state
            self._on_state(state)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._reap)

    def _reap(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("A task of a peer failed", exc_info=error)

    async def _close(self) -> None:
        self.track.stop()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if self._answering is not None:
            await asyncio.wait([self._answering])
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._connection is not None:
            await self._connection.close()
        self._tell("closed")


def _check_offer(offer_sdp: str) -> None:
    try:
        media = SessionDescription.parse(offer_sdp).media
    except Exception as error:  # aiortc's parser lets assertions and lookups fail; it touches nothing else
        raise _sdp_invalid() from error
    if not any(section.kind == "video" and section.direction in ("sendrecv", "recvonly") for section in media):
        raise WireError(
            "sdp_without_video", "The offer has no video section to send to.", "Add a sendrecv video transceiver."
        )


def _sdp_invalid() -> WireError:
    return WireError(
        "sdp_invalid", "The offer is not a session description that can be read.", "Send the browser's own offer."
    )


def _read_candidate(candidate: Mapping[str, Any] | None) -> Any:
    line = None if candidate is None else candidate.get("candidate")
    if candidate is None or line is None or line == "":
        return None
    try:
        parsed = candidate_from_sdp(line.removeprefix("candidate:"))
        if not 0 <= parsed.port <= 65535:
            raise ValueError("port out of range")
    except (AssertionError, ValueError, AttributeError):
        raise WireError(
            "candidate_invalid", "The ICE candidate cannot be read.", "Send the browser's candidate as it is."
        ) from None
    parsed.sdpMid, parsed.sdpMLineIndex = candidate.get("sdpMid"), candidate.get("sdpMLineIndex")
    if parsed.sdpMid is None and parsed.sdpMLineIndex is None:
        raise WireError("candidate_invalid", "The ICE candidate names no media section.", "Add sdpMid.")
    return parsed
