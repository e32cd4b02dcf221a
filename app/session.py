"""One stream's life: from an opened WebSocket to its end.

Owns the peer, the camera's newest frames, the inbox and the feed; turns messages into changes and events into
messages. Knows neither torch nor the socket: a `Channel` carries its words.
"""

import asyncio
import logging
import secrets
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

import numpy as np

from app.camera import Camera
from app.errors import DENSE_ONLY, INTERNAL, SPOKEN, AppError, error_message
from app.feed import Feed, Worker
from app.house import WISHES, Channel, ChannelClosedError, House, PeerLike, defaults, describe, told_tiles
from app.mailbox import Inbox, Made, Order
from app.savings import Savings
from app.states import MOVES, State
from pipeline.chunk import Controls
from pipeline.errors import PipelineError
from streaming.messages import (
    CandidateMessage,
    ControlsMessage,
    OfferMessage,
    PictureMessage,
    PingMessage,
    ResetMessage,
    parse,
)
from streaming.picture import read_picture

log = logging.getLogger("stillstream.session")

EARLY_CANDIDATES = 64
CHANGES_LIMIT = 64  # that no picture has followed yet: a slider moved while paused makes eight a second
# How many frames may wait to leave, in chunks. The next chunk is begun when so many wait: this is how long it may take
# before the picture stands still, and how long after its camera frames it is seen. With 1, a chunk that takes its usual
# 70 % of real time could be late by less than half of that, which a browser on the same two cores easily costs. The
# price of 1.5 is a quarter of a second behind the camera. A new prompt does not wait for these frames.
BUFFER_CHUNKS = 1.5
MEDIA_LOST = AppError("media_lost", "The video connection was lost.", "The page connects again by itself.")
MEDIA_UNREACHABLE = AppError(
    "media_unreachable",
    "The video connection could not be made.",
    "A firewall may be in the way: try another network, or name a STUN server in STILLSTREAM_ICE_SERVERS.",
)


@dataclass
class Change:
    """Controls that the page sent and that no picture has followed yet."""

    id: int
    epoch: int
    arrived_s: float
    acked: bool = False


class Session:
    def __init__(self, house: House, channel: Channel) -> None:
        self.name = secrets.token_hex(4)
        self.state = State.WAITING
        self._house = house
        self._channel = channel
        self._camera = Camera(house.config, house.clock, self._camera_stopped, self._camera_resized)
        self._inbox = Inbox(Controls(**defaults(house.config)), self._camera.window)
        self._feed = Feed(self._inbox, self, house.clock)
        self._peer: PeerLike | None = None
        self._candidates: list[dict[str, Any] | None] = []
        self._changes: list[Change] = []
        self._offered = self._told_busy = self._told_dense = self._connected = self._recovering = False
        self._savings = Savings()
        self._chunk_ms = self._latency_ms = 0.0
        self._unknown_words: tuple[str, ...] = ()
        self._tasks: set[asyncio.Task[None]] = set()
        self._over: asyncio.Future[tuple[Exception, bool] | None] = asyncio.get_running_loop().create_future()

    # The life

    async def run(self) -> None:
        """Serve the page until it goes or the stream cannot go on."""
        with self._house.metrics.sessions.track_inprogress():
            log.info("session %s opened", self.name)
            await self._run()
            log.info("session %s closed", self.name)

    async def _run(self) -> None:
        self._send("welcome", **self._welcome())
        self._start(self._listen())
        self._start(self._end_if_silent())
        try:
            end = await self._over
            if end is not None:
                self._tell_end(*end)
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            if self._peer is not None:
                await self._peer.close()
            self._move(State.CLOSED)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and isinstance(error := task.exception(), Exception):
            self._end(error)

    def _end(self, error: Exception, *, fatal: bool = True) -> None:
        """fatal: the page should not come back by itself."""
        if not self._over.done():
            self._over.set_result(None if isinstance(error, ChannelClosedError) else (error, fatal))

    def _tell_end(self, error: Exception, fatal: bool) -> None:
        if isinstance(error, SPOKEN):
            log.warning("session %s ends: %s (%s)", self.name, error, error.code)
            self._channel.send(error_message(error, fatal=fatal))
        else:
            log.error("session %s failed", self.name, exc_info=error)
            self._channel.send(error_message(INTERNAL, fatal=fatal))

    async def _listen(self) -> None:
        while True:
            text = await self._channel.receive()
            await self._complain_about(self._take(text))

    async def _complain_about(self, work: Coroutine[Any, Any, None]) -> None:
        """Do it; what is wrong with it is said, and the session goes on."""
        try:
            await work
        except SPOKEN as error:
            log.debug("session %s: %s", self.name, error.code)
            self._channel.send(error_message(error))

    async def _end_if_silent(self) -> None:
        await self._house.sleep(self._house.silent_s)
        if not self._offered:
            raise AppError(
                "silent_client",
                f"No offer came for {self._house.silent_s:g} seconds.",
                "Connect again and send an offer.",
            )

    async def _stream(self, offer_sdp: str) -> None:
        async with self._house.admission.place(self._queued) as worker:
            self._move(State.CONNECTING)
            config = self._house.config
            peer = self._peer = self._house.make_peer(
                on_frame=self._camera.take,
                on_state=self._peer_moved,
                fps=config.fps,
                buffer_frames=int(config.frames_per_chunk * BUFFER_CHUNKS),
                camera_size=(config.width, config.height),
                ice_servers=self._ice_servers(),
            )
            self._start(self._run_feed(worker, peer))
            self._start(self._end_if_unconnected())
            self._start(self._report(peer))
            for candidate in self._candidates:
                await self._complain_about(peer.add_candidate(candidate))
            self._send("answer", sdp=await peer.answer(offer_sdp))
            await asyncio.Future()  # the place is kept until the session ends

    async def _run_feed(self, worker: Worker, peer: PeerLike) -> None:
        await self._feed.run(worker, peer.track)

    async def _end_if_unconnected(self) -> None:
        await self._house.sleep(self._house.connect_s)
        if not self._connected:
            raise MEDIA_UNREACHABLE

    async def _report(self, peer: PeerLike) -> None:
        track, camera, metrics = peer.track, self._camera, self._house.metrics
        shown = dropped = seen = 0
        then_s = self._house.clock()
        while True:
            await self._house.sleep(1.0)
            now_s = self._house.clock()
            span_s = max(now_s - then_s, 1e-3)
            all_dropped = track.frames_dropped + self._feed.frames_dropped
            metrics.frames_shown.inc(track.frames_shown - shown)
            metrics.frames_dropped.inc(all_dropped - dropped)
            metrics.camera_frames.inc(camera.frames_seen - seen)
            self._send(
                "stats",
                fps=round((track.frames_shown - shown) / span_s, 1),
                chunk_ms=round(self._chunk_ms, 1),
                latency_ms=round(self._latency_ms, 1),
                queue_frames=track.queue_frames,
                dropped_frames=all_dropped,
                camera_fps=round((camera.frames_seen - seen) / span_s, 1),
                lag_ms=round(self._house.lag_ms(), 1),
            )
            shown, dropped, seen, then_s = track.frames_shown, all_dropped, camera.frames_seen, now_s

    # What the page says

    async def _take(self, text: str) -> None:
        match parse(text, self._house.config.prompt_limit):
            case OfferMessage(sdp=sdp):
                if self._offered:
                    raise AppError("already_started", "This session has its video connection.", "Open another session.")
                self._offered = True
                self._start(self._stream(sdp))
            case CandidateMessage() as message:
                await self._add_candidate(message)
            case ControlsMessage() as message:
                self._control(message)
            case PictureMessage() as message:
                await self._begin_with(message)
            case ResetMessage(id=id):
                self._change(id, fresh=True)
            case PingMessage(id=id):
                self._send("pong", id=id)

    async def _add_candidate(self, message: CandidateMessage) -> None:
        candidate = message.model_dump(exclude={"kind"}) if message.candidate else None
        if self._peer is not None:
            await self._peer.add_candidate(candidate)
        elif len(self._candidates) < EARLY_CANDIDATES:
            self._candidates.append(candidate)

    def _control(self, message: ControlsMessage) -> None:
        now = self._inbox.controls
        asked = message.model_dump(include=set(WISHES), exclude_none=True)
        changes = {name: value for name, value in asked.items() if value != getattr(now, name)}
        camera_moved = message.camera is not None and message.camera != self._camera.on
        if camera_moved:
            self._camera.switch(bool(message.camera))
        if message.paused is not None and message.paused != now.paused:
            self._feed.pause(message.paused)
            self._settle()
        if changes or camera_moved:
            self._change(message.id, fresh="seed" in changes, **changes)
        else:
            self._send("ack", id=message.id, epoch=self._feed.epoch, chunk=self._feed.next_index)

    async def _begin_with(self, message: PictureMessage) -> None:
        """The stream begins anew from a picture, now and whenever it begins again."""
        config, still_THWC = self._house.config, None
        if message.data is not None:
            picture_HWC = await asyncio.to_thread(read_picture, message.data, config.width, config.height)
            still_THWC = np.repeat(picture_HWC[None], config.pictures(0), 0)
        self._inbox.still_THWC = still_THWC
        self._change(message.id, fresh=True)

    def _change(self, id: int, *, fresh: bool, **changes: object) -> None:
        self._feed.change(fresh=fresh, **changes)
        self._changes.append(Change(id, self._feed.epoch, self._house.clock()))
        if len(self._changes) > CHANGES_LIMIT:
            oldest = self._changes.pop(0)
            if not oldest.acked:
                self._send("ack", id=oldest.id, epoch=oldest.epoch, chunk=self._feed.next_index)

    # What the feed tells (feed.Listener)

    def taken(self, epoch: int, index: int) -> None:
        for change in self._changes:
            if not change.acked and change.epoch <= epoch:
                change.acked = True
                self._send("ack", id=change.id, epoch=change.epoch, chunk=index)

    def made(self, order: Order, made: Made) -> None:
        self._chunk_ms = made.chunk_ms
        self._house.metrics.took(made.chunk_ms, made.stages_ms)
        self._savings.took(order.controls, order.source_THWC is not None, made.chunk, made.chunk_ms)
        if self._inbox.controls.regions or self._inbox.controls.paint:
            self._tell_regions(made)
        if made.unknown_words != self._unknown_words:
            self._unknown_words = made.unknown_words
            self._send("notice", unknown_words=list(made.unknown_words))

    def _tell_regions(self, made: Made) -> None:
        if self._house.config.tiles is None and not self._told_dense:
            self._told_dense = True
            self._channel.send(error_message(DENSE_ONLY))
        share = self._savings.share
        saved = None if share is None else round(share, 3)
        chunk_ms = round(made.chunk_ms, 1)
        self._send("regions", chunk=made.chunk.index, **told_tiles(made.chunk), chunk_ms=chunk_ms, saved=saved)

    def shown(self, epoch: int, latency_ms: float) -> None:
        self._latency_ms = latency_ms
        now_s = self._house.clock()
        followed = [change for change in self._changes if change.epoch <= epoch]
        self._changes = [change for change in self._changes if change.epoch > epoch]
        for change in followed:
            self._send("shown", id=change.id, latency_ms=round((now_s - change.arrived_s) * 1000, 1))

    def refused(self, error: PipelineError) -> None:
        self._channel.send(error_message(error))

    def recovering(self, lost: bool) -> None:
        self._recovering = lost
        self._settle()

    # What peer, camera and queue tell

    def _peer_moved(self, state: str) -> None:
        if state == "connected":
            self._connected = True
            self._camera.connected()
            self._settle()
        elif state in ("failed", "closed"):
            self._end(MEDIA_LOST if self._connected else MEDIA_UNREACHABLE, fatal=not self._connected)

    def _camera_stopped(self) -> None:
        stopped = AppError(
            "camera_stopped",
            "No pictures come from the camera any more; the stream goes on from the prompt alone.",
            "Check the camera, or switch it off.",
        )
        self._channel.send(error_message(stopped))

    def _camera_resized(self) -> None:
        self._inbox.post(source=self._inbox.controls.source + 1)

    def _queued(self, place: int) -> None:
        if not self._told_busy:
            self._told_busy = True
            busy = AppError("server_busy", "All places are taken.", "Stay: the stream starts when a place is free.")
            self._channel.send(error_message(busy))
        self._send("state", state=self.state, note=f"You are number {place} in the queue.")

    # What is said

    def _settle(self) -> None:
        if self.state in (State.WAITING, State.CLOSED) or not self._connected:
            return
        if self._recovering:
            self._move(State.RECOVERING, "The generator is starting again.")
        else:
            self._move(State.PAUSED if self._inbox.controls.paused else State.LIVE)

    def _move(self, state: State, note: str = "") -> None:
        if state is self.state:
            return
        assert state in MOVES[self.state], f"a session cannot go from {self.state} to {state}"
        self.state = state
        self._send("state", state=state, note=note)

    def _send(self, kind: str, **fields: Any) -> None:
        self._channel.send({"kind": kind, **fields})

    def _ice_servers(self) -> list[dict[str, str]]:
        return [{"urls": url} for url in self._house.ice_servers]

    def _welcome(self) -> dict[str, Any]:
        config = self._house.config
        return {
            "session": self.name,
            "model": describe(config),
            "ice_servers": self._ice_servers(),
            "defaults": defaults(config),
        }
