"""The whole server on a real port: HTTP, WebSocket, a spawned worker with a fake engine, a viewer over UDP."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from app.config import Settings
from app.serve import bind, uvicorn_config
from app.server import UNSENT_LIMIT, SocketChannel, create_app, known_host, same_origin
from app.worker import EngineFactory
from pipeline.errors import PipelineError
from tests.app.fakes import LoadLater, load_damaged, load_fake
from tests.streaming.viewer import Viewer, until

ROOT = Path(__file__).parents[2]


class Page:
    """A page's WebSocket that keeps what it hears."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket
        self.heard: list[dict[str, Any]] = []

    async def say(self, kind: str, **fields: Any) -> None:
        await self.socket.send(json.dumps({"kind": kind, **fields}))

    async def hear(self, kind: str, **wanted: Any) -> dict[str, Any]:
        """The next message of this kind with these fields; all messages before it are kept."""
        async with asyncio.timeout(60):
            while True:
                message = json.loads(await self.socket.recv())
                self.heard.append(message)
                if message["kind"] == kind and wanted.items() <= message.items():
                    return dict(message)

    async def end(self) -> list[dict[str, Any]]:
        """All until the server hangs up."""
        with pytest.raises(ConnectionClosed):
            await self.hear("never")
        return self.heard


class Server:
    def __init__(self, port: int, app: Any) -> None:
        self.address = f"127.0.0.1:{port}"
        self.stage = app.state.stage

    @asynccontextmanager
    async def page(self, **words: Any) -> AsyncIterator[Page]:
        async with connect(f"ws://{self.address}/ws", **words) as socket:
            page = Page(socket)
            await page.hear("welcome")
            yield page

    async def get(self, path: str) -> httpx.Response:
        async with httpx.AsyncClient() as client:
            return await client.get(f"http://{self.address}{path}")

    @property
    def pid(self) -> int:
        return int(self.stage.workers[0].pid)


@asynccontextmanager
async def serving(
    factory: EngineFactory = load_fake,
    on_failure: Callable[[Exception], None] = lambda error: None,
    loaded: bool = True,
    **settings: Any,
) -> AsyncIterator[Server]:
    app = create_app(Settings(threads=1, **settings), factory, on_failure=on_failure)
    with bind("127.0.0.1", 0) as listener:
        server = uvicorn.Server(uvicorn_config(app))
        task = asyncio.create_task(server._serve([listener]))
        await until(lambda: server.started)
        made = Server(listener.getsockname()[1], app)
        if loaded:
            await made.stage.loaded.wait()
        try:
            yield made
        finally:
            server.should_exit = True
            await task


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with serving() as made:
        yield made


@asynccontextmanager
async def watching(page: Page) -> AsyncIterator[Viewer]:
    viewer = Viewer()
    try:
        await page.say("offer", sdp=await viewer.offer())
        await viewer.accept((await page.hear("answer"))["sdp"])
        await until(lambda: bool(viewer.seen))
        yield viewer
    finally:
        await viewer.close()


def _sees(viewer: Viewer, channel: int) -> Callable[[], bool]:
    """Whether the newest picture is mostly of this primary colour."""
    return lambda: int(viewer.seen[-1][1].mean((0, 1)).argmax()) == channel


async def test_a_viewer_sees_the_prompt_and_then_the_next_prompt(server: Server) -> None:
    async with server.page() as page, watching(page) as viewer:
        await page.hear("state", state="live")
        await until(_sees(viewer, 0))

        await page.say("controls", id=1, prompt="a blue ball")
        ack = await page.hear("ack", id=1)
        shown = await page.hear("shown", id=1)
        await until(_sees(viewer, 2))

        assert ack["chunk"] > 0
        assert shown["latency_ms"] > 0


async def test_a_killed_worker_comes_back_and_the_viewer_sees_the_same_prompt_again(server: Server) -> None:
    async with server.page() as page, watching(page) as viewer:
        await page.say("controls", id=1, prompt="a green ball")
        await page.hear("shown", id=1)
        os.kill(server.pid, signal.SIGKILL)
        await page.hear("state", state="recovering")
        assert server.stage.health == "recovering"
        await page.hear("state", state="live")
        seen = len(viewer.seen)
        await until(lambda: len(viewer.seen) > seen + 20)

        assert _sees(viewer, 1)()
        assert "stillstream_worker_restarts_total 1.0" in (await server.get("/metrics")).text


async def test_health_info_page_and_metrics_are_there(server: Server) -> None:
    health, info, page, metrics = [await server.get(path) for path in ("/api/health", "/api/info", "/", "/metrics")]

    assert (health.status_code, health.json()) == (200, {"status": "ready"})
    assert info.json()["status"] == "ready"
    assert info.json()["model"]["name"] == "fake"
    assert info.json()["versions"]["stillstream"]
    assert "<video" in page.text
    assert "stillstream_sessions 0.0" in metrics.text


async def test_a_browser_never_mixes_two_versions_of_the_page(server: Server) -> None:
    files = [await server.get(path) for path in ("/", "/static/main.js")]

    assert [file.headers["Cache-Control"] for file in files] == ["no-cache", "no-cache"]


async def test_the_page_can_be_fetched_while_the_model_loads(tmp_path: Path) -> None:
    async with serving(LoadLater(tmp_path / "now"), loaded=False) as server:
        health = await server.get("/api/health")
        info = await server.get("/api/info")

    assert (health.status_code, health.json()) == (503, {"status": "loading"})
    assert (info.status_code, info.json()["status"]) == (200, "loading")  # a browser would print anything but 200
    assert "model" not in info.json()


async def test_a_page_that_comes_while_the_model_loads_is_welcomed_afterwards(tmp_path: Path) -> None:
    now = tmp_path / "now"
    async with serving(LoadLater(now), loaded=False) as server, connect(f"ws://{server.address}/ws") as socket:
        page = Page(socket)
        await page.hear("state", state="waiting")
        now.touch()
        await page.hear("welcome")


@pytest.mark.parametrize("leaves", [False, True])
async def test_a_server_that_ends_while_the_model_loads_waits_for_no_page(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, leaves: bool
) -> None:
    async with serving(LoadLater(tmp_path / "now"), loaded=False) as server:
        socket = await connect(f"ws://{server.address}/ws")
        await Page(socket).hear("state", state="waiting")
        if leaves:
            await socket.close()
    await socket.close()

    assert "graceful shutdown exceeded" not in caplog.text


async def test_what_a_page_says_while_the_model_loads_is_heard_afterwards(tmp_path: Path) -> None:
    now = tmp_path / "now"
    async with serving(LoadLater(now), loaded=False) as server, connect(f"ws://{server.address}/ws") as socket:
        page = Page(socket)
        await page.hear("state", state="waiting")
        await page.say("ping", id=4)
        now.touch()
        await page.hear("pong", id=4)


async def test_weights_that_are_damaged_are_told_to_whoever_serves() -> None:
    failures: list[Exception] = []
    async with serving(load_damaged, failures.append, loaded=False):
        await until(lambda: bool(failures))

    assert isinstance(failures[0], PipelineError)
    assert failures[0].code == "weights_damaged"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("}garbage{", "json_invalid"),
        (b"\x00\x01", "json_invalid"),
        ("x" * 300_000, "message_too_large"),
        ('{"kind": "dance"}', "kind_unknown"),
        ('{"kind": "controls", "id": 1, "strength": 7}', "field_invalid"),
        (json.dumps({"kind": "controls", "id": 1, "prompt": "long " * 20}), "prompt_too_long"),
        ('{"kind": "candidate", "candidate": "nonsense", "sdpMid": "0"}', None),
    ],
)
async def test_bad_input_is_answered_and_the_socket_stays_open(
    server: Server, text: str | bytes, code: str | None
) -> None:
    async with server.page() as page:
        await page.socket.send(text)
        if code is not None:
            error = await page.hear("error", code=code, fatal=False)
            assert error["message"]
            assert error["next"]
        await page.say("ping", id=4)
        assert await page.hear("pong") == {"kind": "pong", "id": 4}


async def test_a_message_beyond_all_measure_is_cut_off_and_the_server_lives_on(server: Server) -> None:
    async with server.page() as page:
        await page.socket.send("x" * 3_000_000)
        await page.end()
    assert (await server.get("/api/health")).json() == {"status": "ready"}


@pytest.mark.parametrize(
    ("sdp", "code"),
    [
        ("v=0\r\nm=video nine\r\n", "sdp_invalid"),
        ("v=0\r\no=- 1 1 IN IP4 127.0.0.1\r\ns=-\r\nt=0 0\r\n", "sdp_without_video"),
    ],
)
async def test_an_offer_that_cannot_be_used_ends_the_session_with_a_reason(server: Server, sdp: str, code: str) -> None:
    async with server.page() as page:
        await page.say("offer", sdp=sdp)
        heard = await page.end()

    assert [message["code"] for message in heard if message["kind"] == "error"] == [code]
    assert heard[-1]["state"] == "closed"
    async with server.page() as page, watching(page):
        await page.hear("state", state="live")


async def test_an_offer_without_a_codec_of_ours_ends_the_session_with_a_reason(server: Server) -> None:
    viewer = Viewer()
    async with server.page() as page:
        await page.say("offer", sdp=(await viewer.offer()).replace("VP8/", "VP9/").replace("H264/", "AV1/"))
        heard = await page.end()
    await viewer.close()

    assert [message["code"] for message in heard if message["kind"] == "error"] == ["no_common_codec"]


async def test_a_silent_socket_is_closed_with_a_reason() -> None:
    async with serving(silent_s=0.2) as server, server.page() as page:
        heard = await page.end()

    assert [message["code"] for message in heard if message["kind"] == "error"] == ["silent_client"]


async def test_a_second_viewer_waits_and_starts_when_the_first_leaves_and_a_third_is_turned_away() -> None:
    async with serving(queue=1) as server, server.page() as second:
        async with server.page() as first, watching(first):
            viewer = Viewer()
            await second.say("offer", sdp=await viewer.offer())
            await second.hear("error", code="server_busy", fatal=False)
            await second.hear("state", state="waiting")
            async with server.page() as third:
                await third.say("offer", sdp="v=0")
                await third.hear("error", code="server_busy", fatal=True)
        await viewer.accept((await second.hear("answer"))["sdp"])
        await until(lambda: bool(viewer.seen))
        await viewer.close()


async def test_a_tab_that_closes_frees_its_session(server: Server) -> None:
    async with server.page() as page, watching(page):
        assert "stillstream_sessions 1.0" in (await server.get("/metrics")).text
    async with server.page() as page, watching(page):
        await page.hear("state", state="live")


class DeafSocket:
    """A page that takes nothing any more."""

    def __init__(self) -> None:
        self.closed = asyncio.Event()

    async def send_json(self, message: dict[str, Any]) -> None:
        await asyncio.Future()

    async def close(self) -> None:
        self.closed.set()


async def test_a_page_that_does_not_read_is_cut_off_and_nobody_waits_for_it() -> None:
    socket = DeafSocket()
    channel = SocketChannel(socket)  # type: ignore[arg-type]
    await asyncio.sleep(0)
    for _ in range(UNSENT_LIMIT + 2):
        channel.send({"kind": "stats"})

    await asyncio.wait_for(socket.closed.wait(), 60)
    await channel.close()


def test_the_server_itself_never_loads_torch() -> None:
    code = "import app.serve, sys; print('torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)

    assert ended.stdout.strip() == "False"


async def test_another_sites_page_is_refused(server: Server) -> None:
    with pytest.raises(InvalidStatus):
        async with server.page(origin="http://evil.example"):
            pass
    async with server.page(origin=f"http://{server.address}"):
        pass


def test_the_origin_must_name_the_same_host_and_port() -> None:
    assert same_origin("https://host:1", "host:1")
    assert same_origin(None, "host:1")
    assert not same_origin("http://host:2", "host:1")
    assert not same_origin("null", "host:1")


@pytest.mark.parametrize(
    ("host", "listens", "names", "known"),
    [
        ("127.0.0.1:8000", "127.0.0.1", "", True),
        ("[::1]:8000", "::1", "", True),
        ("localhost:8000", "127.0.0.1", "", True),
        ("evil.example:8000", "127.0.0.1", "", False),
        ("evil.example", "localhost", "", False),
        ("video.example", "127.0.0.1", "video.example", True),
        ("video.example", "0.0.0.0", "", True),
        ("evil.example", "0.0.0.0", "video.example", False),
        (None, "127.0.0.1", "", False),
    ],
)
def test_a_server_for_this_machine_answers_to_addresses_and_names_it_knows(
    host: str | None, listens: str, names: str, known: bool
) -> None:
    assert known_host(host, Settings(host=listens, hosts=names)) is known  # type: ignore[arg-type]


async def test_a_socket_for_an_unknown_name_is_refused() -> None:
    async with serving() as server:
        with pytest.raises(InvalidStatus):
            await connect("ws://evil.example/ws", host="127.0.0.1", port=int(server.address.rpartition(":")[2]))


async def test_a_server_that_ends_hangs_up_and_joins_its_worker() -> None:
    async with serving() as server:
        page = Page(await connect(f"ws://{server.address}/ws"))
    await page.end()

    assert server.stage.health == "stopped"
