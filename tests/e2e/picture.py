"""Takes the README's picture: the page while a stream runs, with its figures open.

python -m tests.e2e.picture docs/picture.png "a red ball bounces in the park"
"""

import sys
import tempfile
import time
from pathlib import Path

from playwright.sync_api import sync_playwright

from tests.e2e import chromium
from tests.e2e.running import serving
from tests.e2e.viewer import Viewer

SETTLE_S = 6.0


def take(path: Path, prompt: str) -> None:
    executable = chromium.find()
    log = Path(tempfile.mkdtemp()) / "log.txt"
    with serving(log) as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=list(chromium.ARGS))
        viewer = Viewer(browser.new_context(viewport={"width": 1280, "height": 800}), server.url)
        viewer.page.click("#start")
        viewer.wait_for_state("live")
        viewer.wait_for_frames()
        viewer.ask(prompt)
        viewer.page.press("#prompt", "Escape")
        viewer.page.keyboard.press("i")
        time.sleep(SETTLE_S)
        viewer.page.screenshot(path=path)
        browser.close()


if __name__ == "__main__":
    take(Path(sys.argv[1]), sys.argv[2])
