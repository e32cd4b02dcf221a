"""One real server and one real browser for each module of browser tests."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, sync_playwright

from tests.e2e import chromium
from tests.e2e.running import Server, serving, write_clip
from tests.e2e.viewer import Viewer, wait_until


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server") / "log.txt") as running:
        yield running


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    clip = tmp_path_factory.mktemp("camera") / "square.y4m"
    write_clip(clip)
    path = chromium.find()
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(
            executable_path=path,
            args=[
                *chromium.ARGS,
                "--autoplay-policy=no-user-gesture-required",
                "--use-fake-device-for-media-stream",
                "--use-fake-ui-for-media-stream",
                f"--use-file-for-fake-video-capture={clip}",
            ],
        )
        yield launched
        launched.close()


@contextmanager
def pages(server: Server, browser: Browser) -> Iterator[Callable[[], Viewer]]:
    """Opens pages, each as a person of their own. Afterwards no page may have complained, and all are gone."""
    context = browser.new_context(viewport={"width": 1000, "height": 700})
    viewers: list[Viewer] = []

    def open_one() -> Viewer:
        viewers.append(Viewer(context, server.url))
        return viewers[-1]

    try:
        yield open_one
    finally:
        context.close()
    assert [complaint for viewer in viewers for complaint in viewer.complaints] == []
    wait_until(lambda: server.open_sessions() == 0, "the end of all sessions")


@pytest.fixture
def open_page(server: Server, browser: Browser) -> Iterator[Callable[[], Viewer]]:
    with pages(server, browser) as opens:
        yield opens
