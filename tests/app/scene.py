"""A session and all that it talks to: every neighbour a fake, and time in the test's hands."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from app.admission import Admission
from app.house import House
from app.session import Session
from pipeline.config import ModelConfig
from tests.app.fakes import CONFIG, FakeClock, FakePage, FakePeer, FakeTrack, FakeWorker, running, settle


@dataclass
class Scene:
    """A session, and all that it talks to."""

    page: FakePage
    session: Session
    worker: FakeWorker
    clock: FakeClock
    peers: list[FakePeer]
    task: "asyncio.Task[None]"

    @property
    def peer(self) -> FakePeer:
        return self.peers[0]

    @property
    def track(self) -> FakeTrack:
        return self.peer.track

    async def say(self, kind: str, **fields: Any) -> None:
        self.page.said.put_nowait(json.dumps({"kind": kind, **fields}))
        await settle()

    async def go_live(self) -> None:
        await self.say("offer", sdp="v=0")
        self.peer.on_state("connected")
        await settle()


@asynccontextmanager
async def scene(admission: Admission[FakeWorker] | None = None, config: ModelConfig = CONFIG) -> AsyncIterator[Scene]:
    worker, clock, page = FakeWorker(), FakeClock(), FakePage()
    peers: list[FakePeer] = []

    def make_peer(**words: Any) -> FakePeer:
        peers.append(FakePeer(**words))
        return peers[-1]

    house = House(config, admission or Admission([worker], 1), make_peer, clock=clock, sleep=clock.sleep)
    session = Session(house, page)
    async with running(session.run()) as task:
        yield Scene(page, session, worker, clock, peers, task)
