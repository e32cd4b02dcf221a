"""A Chromium that starts: finds one, or installs one when run as a program, so that no browser test can be skipped.

    python tests/e2e/chromium.py

Knows nothing of Stillstream.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache

from playwright.sync_api import Error, sync_playwright

VARIABLE = "STILLSTREAM_CHROMIUM"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ARGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
ADVICE = f"Install Chromium and set {VARIABLE} to its path, then run this again."


class NoChromiumError(Exception):
    """No Chromium here starts. The text says what was tried and what to do."""


@cache
def find() -> str:
    """The path of a Chromium that was seen to render a page. Raises NoChromiumError."""
    tried = []
    for path in _candidates():
        trouble = _trouble(path)
        if trouble is None:
            return path
        tried.append(f"{path} does not start ({trouble})")
    raise NoChromiumError(f"{'; '.join(tried) or 'There is no Chromium here'}. {ADVICE}")


def install() -> None:
    """Try the ways there are to get a Chromium, until one starts. Raises NoChromiumError."""
    for command in _ways():
        print(f"No Chromium yet; running: {' '.join(command)}", flush=True)
        if subprocess.run(command, check=False).returncode != 0:
            continue
        try:
            find()
        except NoChromiumError:
            continue
        return
    find()


def _candidates() -> Iterator[str]:
    named = os.environ.get(VARIABLE)
    if named:
        yield named
        return
    for name in NAMES:
        path = shutil.which(name)
        if path:
            yield path
    with sync_playwright() as playwright:
        path = playwright.chromium.executable_path
    if os.path.exists(path):
        yield path


def _trouble(path: str) -> str | None:
    """What is wrong with this Chromium, in a few words; None when it renders a page."""
    if not os.path.isfile(path):
        return "there is no such file"
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=path, args=list(ARGS))
            page = browser.new_page()
            page.goto("data:text/html,<p>ready</p>")
            text = page.inner_text("p")
            picture = page.screenshot()
            browser.close()
    except Error as error:
        return error.message.strip().splitlines()[0]
    return None if text == "ready" and picture else "it renders nothing"


def _ways() -> Iterator[list[str]]:
    root = os.geteuid() == 0
    if root and shutil.which("apt-get"):
        yield ["sh", "-c", "apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y chromium"]
    yield [sys.executable, "-m", "playwright", "install", *(["--with-deps"] if root else []), "chromium"]


def main() -> int:
    try:
        try:
            path = find()
        except NoChromiumError:
            if os.environ.get(VARIABLE):
                raise
            install()
            path = find()
    except NoChromiumError as error:
        print(f"Browser tests cannot run: {error}", file=sys.stderr)
        return 1
    print(f"Browser tests use {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
