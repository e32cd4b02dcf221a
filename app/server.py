"""The HTTP face: page, health, info, metrics and one WebSocket per session.

Owns the workers' lives: they load while the page can already be fetched, and are joined when the server ends.
"""

import asyncio
import logging
import platform
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, Response, WebSocket, WebSocketDisconnect
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles

import static
from app.admission import Admission
from app.config import Settings
from app.errors import SPOKEN
from app.house import ChannelClosedError, House, PeerLike, defaults, describe
from app.lag import LagMonitor
from app.metrics import Metrics
from app.session import Session
from app.states import State
from app.worker import EngineFactory
from app.worker_client import Health, WorkerClient
from streaming.peer import Peer
from streaming.rates import tune_encoders

log = logging.getLogger("stillstream.server")

PAGES = Path(static.__file__).parent
UNSENT_LIMIT = 256
LAST_WORDS_S = 2.0
LOADING = "The model is being loaded."
PACKAGES = ("stillstream", "torch", "diffusers", "aiortc", "av", "fastapi")


class SocketChannel:
    """A session's words on a WebSocket. Sending never waits; a page that does not read is cut off."""

    def __init__(self, socket: WebSocket) -> None:
        self._socket = socket
        self._unsent: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue(UNSENT_LIMIT)
        self._writer = asyncio.create_task(self._write())
        self._heard: deque[str] = deque(maxlen=UNSENT_LIMIT)

    async def until(self, event: asyncio.Event) -> None:
        """Wait for it, and keep what the page says meanwhile for `receive`. Raises ChannelClosedError when the page
        goes or the server ends: nobody should wait for either."""
        waiting = asyncio.ensure_future(event.wait())
        try:
            while not event.is_set():
                hearing = asyncio.ensure_future(self._hear())
                try:
                    await asyncio.wait({waiting, hearing}, return_when=asyncio.FIRST_COMPLETED)
                    if hearing.done():
                        self._heard.append(hearing.result())
                finally:
                    hearing.cancel()
        finally:
            waiting.cancel()

    async def receive(self) -> str:
        return self._heard.popleft() if self._heard else await self._hear()

    async def _hear(self) -> str:
        message = await self._socket.receive()
        if message["type"] == "websocket.disconnect":
            raise ChannelClosedError
        # A binary message is answered like any text that is not JSON.
        return message.get("text") or ""

    def send(self, message: dict[str, Any]) -> None:
        if not self._unsent.full():
            self._unsent.put_nowait(message)
        elif not self._writer.cancelling():
            self._writer.cancel()

    async def close(self) -> None:
        """Say what is left, then hang up."""
        if not self._unsent.full():
            self._unsent.put_nowait(None)
        await asyncio.wait({self._writer}, timeout=LAST_WORDS_S)
        self._writer.cancel()

    async def _write(self) -> None:
        # Sending to a page that has gone raises; the session hears of it from receive.
        with suppress(RuntimeError, WebSocketDisconnect):
            try:
                while (message := await self._unsent.get()) is not None:
                    await self._socket.send_json(message)
            finally:
                await self._socket.close()


class PageFiles(StaticFiles):
    """The browser asks each time whether a file is still the same, so that a page never mixes two versions."""

    def file_response(self, *args: Any, **words: Any) -> Response:
        response = super().file_response(*args, **words)
        response.headers["Cache-Control"] = "no-cache"
        return response


class Stage:
    """A server's shared parts and their lives."""

    def __init__(self, settings: Settings, factory: EngineFactory, make_peer: Callable[..., PeerLike]) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.lag = LagMonitor(self.metrics.loop_lag_ms.observe)
        self.workers = [
            WorkerClient(
                factory,
                threads=settings.chosen_threads,
                log_level=settings.log_level,
                on_restart=self.metrics.worker_restarts.inc,
            )
            for _ in range(settings.workers)
        ]
        self.house: House | None = None
        self.loaded = asyncio.Event()
        self._make_peer = make_peer

    @property
    def health(self) -> Health:
        healths = [worker.health for worker in self.workers]
        if self.house is None:
            return Health.LOADING
        return Health.READY if Health.READY in healths else healths[0]

    async def load(self) -> None:
        """Start the workers one after the other: loading is heavy."""
        for worker in self.workers:
            config = await worker.start()
        tune_encoders(config.fps, config.width, config.height)
        self.house = House(
            config=config,
            admission=Admission(self.workers, self.settings.queue),
            make_peer=self._make_peer,
            metrics=self.metrics,
            lag_ms=self.lag.recent_ms,
            ice_servers=self.settings.ice_servers,
            silent_s=self.settings.silent_s,
            connect_s=self.settings.connect_s,
        )
        self.loaded.set()
        log.info("ready: model %s, %d x %d at %d fps", config.name, config.width, config.height, config.fps)

    async def stop(self) -> None:
        await asyncio.gather(*(worker.stop() for worker in self.workers))


def create_app(
    settings: Settings,
    engine_factory: EngineFactory,
    *,
    make_peer: Callable[..., PeerLike] = Peer,
    on_failure: Callable[[Exception], None] = lambda error: None,
) -> FastAPI:
    """on_failure: told when the model cannot be loaded; the server is of no use then."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        stage = app.state.stage = Stage(settings, engine_factory, make_peer)
        lag = asyncio.create_task(stage.lag.run())
        loading = asyncio.create_task(_load(stage, on_failure))
        try:
            yield
        finally:
            lag.cancel()
            loading.cancel()
            await stage.stop()

    app = FastAPI(title="Stillstream", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.mount("/static", PageFiles(directory=PAGES), name="static")

    @app.get("/")
    async def page() -> FileResponse:
        return FileResponse(PAGES / "index.html", headers={"Cache-Control": "no-cache"})

    @app.get("/api/health")
    async def health() -> JSONResponse:
        now = app.state.stage.health
        return JSONResponse({"status": now}, 200 if now is Health.READY else 503)

    @app.get("/api/info")
    async def info() -> JSONResponse:
        house = app.state.stage.house
        if house is None:  # no error: whoever asks for the page asks this too, and may have to ask again
            return JSONResponse({"status": Health.LOADING} | versions())
        told = {"status": app.state.stage.health, "model": describe(house.config), "defaults": defaults(house.config)}
        return JSONResponse(told | versions())

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(app.state.stage.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.websocket("/ws")
    async def session(socket: WebSocket) -> None:
        host = socket.headers.get("host")
        if not known_host(host, settings):
            log.warning("refused a WebSocket for the host %r; if it is yours, name it in STILLSTREAM_HOSTS", host)
            await socket.close(1008)
            return
        if not same_origin(socket.headers.get("origin"), host):
            log.warning("refused a WebSocket from another site")
            await socket.close(1008)
            return
        await socket.accept()
        channel = SocketChannel(socket)
        try:
            stage: Stage = app.state.stage
            if stage.house is None:
                channel.send({"kind": "state", "state": State.WAITING, "note": LOADING})
                await channel.until(stage.loaded)
            assert stage.house is not None, "loaded is set after the house is made"
            await Session(stage.house, channel).run()
        except ChannelClosedError:
            log.debug("a page went while the model was loading")
        finally:
            await channel.close()

    return app


async def _load(stage: Stage, on_failure: Callable[[Exception], None]) -> None:
    try:
        await stage.load()
    except SPOKEN as error:
        on_failure(error)


def same_origin(origin: str | None, host: str | None) -> bool:
    """A browser names the page's origin; another site's page must not drive this server. Tools send none."""
    return origin is None or urlsplit(origin).netloc == host


def known_host(host: str | None, settings: Settings) -> bool:
    """Any site can let a name of its own point here, and its page would then have the same origin; an address cannot.

    A server that others may reach answers to every name, unless its own are told.
    """
    name = urlsplit(f"//{host or ''}").hostname or ""
    try:
        ip_address(name)
    except ValueError:
        told = {"localhost", *settings.hosts}
        return name in told or not (settings.hosts or settings.loopback)
    return True


def versions() -> dict[str, Any]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return {"versions": found}
