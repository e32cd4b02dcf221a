"""A viewer in the same process: a real RTCPeerConnection over UDP on the loopback."""

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
from aiortc import RTCConfiguration, RTCPeerConnection, RTCRtpSender, RTCSessionDescription
from aiortc.mediastreams import MediaStreamError, MediaStreamTrack

from streaming.frames import to_rgb, to_video
from streaming.pacer import Pacer

WIDTH, HEIGHT, FPS = 160, 96, 30
RED, GREEN, BLUE = (200, 30, 30), (30, 180, 40), (30, 40, 200)


class Camera(MediaStreamTrack):
    """A plain colour that the test may change."""

    kind = "video"

    def __init__(self, width: int = 160, height: int = 120) -> None:
        super().__init__()
        self.frame_HWC = np.full((height, width, 3), BLUE, np.uint8)
        self.pacer = Pacer(FPS)

    async def recv(self) -> Any:
        return to_video(self.frame_HWC, await self.pacer.wait())


class Viewer:
    """The browser's side: offers one sendrecv video section, keeps what it sees.

    aiortc knows that a frame is complete once the next one begins, so the newest frame sent is not seen yet.
    """

    def __init__(self, codec: str | None = None, camera: Camera | None = None) -> None:
        self.connection = RTCPeerConnection(RTCConfiguration(iceServers=[]))
        self.seen: list[tuple[float, np.ndarray]] = []
        self.watching: asyncio.Task[None] | None = None
        transceiver = self.connection.addTransceiver(camera or "video", direction="sendrecv")
        if codec is not None:
            known = RTCRtpSender.getCapabilities("video").codecs
            transceiver.setCodecPreferences([c for c in known if c.mimeType == codec])
        self.connection.on("track", self._watch)

    async def offer(self) -> str:
        await self.connection.setLocalDescription(await self.connection.createOffer())
        return self.connection.localDescription.sdp

    async def accept(self, answer_sdp: str) -> None:
        await self.connection.setRemoteDescription(RTCSessionDescription(answer_sdp, "answer"))

    def colours(self) -> list[np.ndarray]:
        return [frame_HWC[HEIGHT // 2, WIDTH // 2].astype(int) for _, frame_HWC in self.seen]

    async def close(self) -> None:
        await self.connection.close()
        if self.watching is not None:
            await self.watching

    def _watch(self, track: MediaStreamTrack) -> None:
        self.watching = asyncio.create_task(self._keep(track))

    async def _keep(self, track: MediaStreamTrack) -> None:
        try:
            while True:
                frame = await track.recv()
                self.seen.append((frame.time, to_rgb(frame)))
        except MediaStreamError:
            pass


def plain(colour: tuple[int, int, int], count: int = 1) -> np.ndarray:
    """A run of frames of one colour."""
    return np.full((count, HEIGHT, WIDTH, 3), colour, np.uint8)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something to be seen; the limit is only there to end a broken run."""
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
