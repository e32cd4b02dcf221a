"""A viewer without a screen: speaks the page's protocol, decodes the stream, notes when each picture was there.

Runs in a process of its own (`watch`), so that decoding costs the server's loop nothing and no clock is shared but the
machine's. Knows nothing of the server's inside.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, TypeVar

import numpy as np
from aiortc import RTCConfiguration, RTCPeerConnection, RTCSessionDescription
from aiortc.mediastreams import MediaStreamError
from websockets.asyncio.client import ClientConnection, connect

from app.errors import AppError

PATIENCE_S = 60.0
BETWEEN_SESSIONS_S = 1.0
SETTLE_S = 4.0
REST_S = 2.5  # between two prompt changes
CHANGE_S = 4.0  # a change that has not stood out by then is not waited for
SMALL = (40, 24)
SPARE_PROMPTS = ("a red ball bounces in the park", "a blue fish moves left under water")

Found = TypeVar("Found")


@dataclass(frozen=True)
class Plan:
    """What a viewer does: short sessions, then one long one with a calm part and prompt changes."""

    sessions: int
    calm_s: float
    prompt_changes: int


@dataclass(frozen=True)
class Sight:
    """A decoded picture. seen_s: when it was there. small_HWC: the picture made small, for comparing."""

    seen_s: float
    small_HWC: np.ndarray


@dataclass(frozen=True)
class PromptChange:
    """Times since the message was sent. change_ms: None when the new picture never stood out from the old ones."""

    server_ms: float
    picture_ms: float
    change_ms: float | None


@dataclass
class Seen:
    """All that one viewer brings home. sights and stats are those of the calm part."""

    first_frame_ms: list[float] = field(default_factory=list)
    sights: list[Sight] = field(default_factory=list)
    stats: list[dict[str, Any]] = field(default_factory=list)
    changes: list[PromptChange] = field(default_factory=list)


class Viewer:
    """One session, from Start to its end."""

    def __init__(self, socket: ClientConnection) -> None:
        self.sights: list[Sight] = []
        self.heard: list[tuple[float, dict[str, Any]]] = []
        self._socket = socket
        self._news = asyncio.Condition()
        self._ended: Exception | None = None
        self._next_id = 0
        self._connection = RTCPeerConnection(RTCConfiguration(iceServers=[]))
        self._connection.addTransceiver("video", direction="sendrecv")
        self._connection.on("track", self._watch)
        self._tasks = [asyncio.create_task(self._listen())]

    async def start(self) -> None:
        await self._connection.setLocalDescription(await self._connection.createOffer())
        await self.send("offer", sdp=self._connection.localDescription.sdp)
        answer = await self.until(lambda: self.of("answer"), "an answer")
        await self._connection.setRemoteDescription(RTCSessionDescription(answer[0]["sdp"], "answer"))

    async def send(self, kind: str, **fields: Any) -> None:
        await self._socket.send(json.dumps({"kind": kind, **fields}))

    async def change(self, prompt: str) -> int:
        """Ask for another prompt; returns the message's id."""
        self._next_id += 1
        await self.send("controls", id=self._next_id, prompt=prompt)
        return self._next_id

    def of(self, kind: str, id: int | None = None) -> list[dict[str, Any]]:
        messages = [message for _, message in self.heard if message["kind"] == kind]
        return [message for message in messages if id is None or message["id"] == id]

    async def until(self, find: Callable[[], Found], what: str, patience_s: float = PATIENCE_S) -> Found:
        """Wait for something to be heard or seen. Raises AppError (`viewer_waits`, or the server's own code)."""
        try:
            async with asyncio.timeout(patience_s), self._news:
                while not (found := find()):
                    if self._ended is not None:
                        raise self._ended
                    await self._news.wait()
                return found
        except TimeoutError:
            raise AppError(
                "viewer_waits", f"The viewer waited {patience_s:g} s for {what}.", "See what the server says."
            ) from None

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._socket.close()  # first, so that the server takes the end of the media for what it is
        await self._connection.close()

    async def _tell(self) -> None:
        async with self._news:
            self._news.notify_all()

    async def _listen(self) -> None:
        async for text in self._socket:
            message = json.loads(text)
            self.heard.append((monotonic(), message))
            if message["kind"] == "error":
                self._ended = AppError(message["code"], message["message"], message["next"])
            await self._tell()
        self._ended = self._ended or AppError("viewer_cut_off", "The server hung up.", "See what it says.")
        await self._tell()

    def _watch(self, track: Any) -> None:
        self._tasks.append(asyncio.create_task(self._see(track)))

    async def _see(self, track: Any) -> None:
        try:
            while True:
                frame = await track.recv()
                seen_s = monotonic()
                width, height = SMALL
                small_HWC = frame.reformat(width=width, height=height, format="rgb24").to_ndarray()
                self.sights.append(Sight(seen_s, small_HWC))
                await self._tell()
        except MediaStreamError:
            return


@asynccontextmanager
async def viewing(url: str) -> AsyncIterator[Viewer]:
    """A session whose first picture is there."""
    async with connect(url.replace("http", "ws", 1) + "/ws") as socket:
        viewer = Viewer(socket)
        try:
            await viewer.start()
            await viewer.until(lambda: viewer.sights, "the first picture")
            yield viewer
        finally:
            await viewer.close()


def watch(url: str, plan: Plan) -> Seen:
    """The whole plan; call it in a process of its own. Raises AppError."""
    return asyncio.run(_watch(url, plan))


async def _watch(url: str, plan: Plan) -> Seen:
    seen = Seen()
    for _ in range(plan.sessions):
        started_s = monotonic()
        async with viewing(url) as viewer:
            seen.first_frame_ms.append((viewer.sights[0].seen_s - started_s) * 1000)
        await asyncio.sleep(BETWEEN_SESSIONS_S)  # the worker finishes its chunk
    async with viewing(url) as viewer:
        await asyncio.sleep(SETTLE_S)
        sights, heard = len(viewer.sights), len(viewer.heard)
        await asyncio.sleep(plan.calm_s)
        seen.sights = viewer.sights[sights:]
        seen.stats = [message for _, message in viewer.heard[heard:] if message["kind"] == "stats"]
        for index in range(plan.prompt_changes):
            seen.changes.append(await _change(viewer, index))
            # Never the same place between two chunks: chunks come at a steady rhythm.
            await asyncio.sleep(REST_S + index * 0.618 % 1)
    return seen


async def _change(viewer: Viewer, index: int) -> PromptChange:
    welcome = viewer.of("welcome")[0]
    examples = [prompt for prompt in welcome["model"]["examples"] if prompt != welcome["defaults"]["prompt"]]
    prompts = [*(examples or SPARE_PROMPTS[1:]), welcome["defaults"]["prompt"] or SPARE_PROMPTS[0]]
    known = viewer.sights[-int(welcome["model"]["fps"]) :]
    sent_s = monotonic()
    id = await viewer.change(prompts[index % len(prompts)])
    shown = await viewer.until(lambda: viewer.of("shown", id), "a changed picture")
    # The new picture leaves as `shown` is said; it is whole at the viewer once the one after it begins to come,
    # and the first picture seen from now on is the one before it.
    before = len(viewer.sights)
    await viewer.until(lambda: len(viewer.sights) > before + 1, "a changed picture")
    picture_s = viewer.sights[before + 1].seen_s
    try:
        stands_out = await viewer.until(
            lambda: first_that_stands_out(known, viewer.sights[before:]), "a change that stands out", CHANGE_S
        )
    except AppError as error:
        if error.code != "viewer_waits":
            raise
        stands_out = None
    return PromptChange(
        server_ms=float(shown[0]["latency_ms"]),
        picture_ms=(picture_s - sent_s) * 1000,
        change_ms=None if stands_out is None else (stands_out.seen_s - sent_s) * 1000,
    )


def first_that_stands_out(known: list[Sight], after: list[Sight]) -> Sight | None:
    """The first picture twice as far from the known ones' mean as the furthest of them, by two levels at least."""
    pictures_THWC = np.stack([sight.small_HWC for sight in known]).astype(np.float32)
    mean_HWC = pictures_THWC.mean(0)
    usual = float(np.abs(pictures_THWC - mean_HWC).mean((1, 2, 3)).max())
    limit = 2 * usual + 2
    return next((sight for sight in after if float(np.abs(sight.small_HWC - mean_HWC).mean()) > limit), None)
