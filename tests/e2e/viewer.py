"""A viewer at the page: opens it, uses it as a person would, and reads what is on the screen.

Knows the page's elements and nothing of the server's code.
"""

import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from playwright.sync_api import BrowserContext, ConsoleMessage

Seen = TypeVar("Seen")

COLUMNS, ROWS = 80, 48

# Runs before the page's own code: remembers sockets, so that a test can cut one, and every state the page shows.
WATCH = (
    """
const [COLUMNS, ROWS] = SIZE;
window.sockets = [];
window.states = [];
const Plain = window.WebSocket;
window.WebSocket = class extends Plain { constructor(...all) { super(...all); window.sockets.push(this); } };
document.addEventListener("DOMContentLoaded", () => {
  const note = () => window.states.push(document.body.dataset.state);
  new MutationObserver(note).observe(document.body, { attributes: true, attributeFilter: ["data-state"] });
});
window.readPicture = (id) => {
  const video = document.getElementById(id);
  if (!video.videoWidth || video.readyState < 2) return null;
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [COLUMNS, ROWS];
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(video, 0, 0, canvas.width, canvas.height);
  return Array.from(context.getImageData(0, 0, canvas.width, canvas.height).data);
};
"""
).replace("SIZE", f"[{COLUMNS}, {ROWS}]")


def wait_until(look: Callable[[], Seen], what: str, limit_s: float = 60.0, every_s: float = 0.1) -> Seen:
    """The first true answer of `look`. Fails, naming what was awaited and what was seen last."""
    end_s = time.monotonic() + limit_s
    while True:
        seen = look()
        if seen:
            return seen
        assert time.monotonic() < end_s, f"{what} did not come within {limit_s:.0f} s; seen last: {seen!r}"
        time.sleep(every_s)


class Viewer:
    def __init__(self, context: BrowserContext, url: str) -> None:
        self.page = context.new_page()
        self.complaints: list[str] = []
        self.page.on("console", self._hear)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.add_init_script(WATCH)
        self.page.goto(url)

    def _hear(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    # What a person does

    def ask(self, prompt: str) -> None:
        """Type a prompt and press Enter; this also starts a stream that is not running."""
        self.page.fill("#prompt", prompt)
        self.page.press("#prompt", "Enter")

    def leave(self) -> None:
        self.page.close()

    # What a person sees

    @property
    def state(self) -> str:
        return str(self.page.evaluate("document.body.dataset.state"))

    @property
    def states(self) -> list[str]:
        """Every state that the page has shown."""
        return list(self.page.evaluate("window.states"))

    @property
    def status(self) -> str:
        return self.page.inner_text("#status")

    @property
    def camera_fps(self) -> float:
        """The figure in the overlay, which has to be open; 0 while there is none."""
        rows = self.page.inner_text("#overlay").splitlines()
        figure = rows[rows.index("Camera") + 1] if "Camera" in rows else ""
        return float(figure.split()[0]) if figure.endswith("fps") else 0.0

    @property
    def trouble(self) -> str:
        """What the page says is wrong; empty when nothing is."""
        return self.page.inner_text("#trouble") if self.page.is_visible("#trouble") else ""

    @property
    def frames_seen(self) -> int:
        return int(self.page.evaluate("document.getElementById('video').getVideoPlaybackQuality().totalVideoFrames"))

    def picture(self, video: str = "video") -> np.ndarray | None:
        """The picture on the screen, (ROWS, COLUMNS, 3), or None while there is none."""
        flat = self.page.evaluate("(id) => window.readPicture(id)", video)
        return None if flat is None else np.array(flat, np.float32).reshape(ROWS, COLUMNS, 4)[..., :3]

    def both_pictures(self) -> tuple[np.ndarray, np.ndarray] | None:
        """What is generated and what the camera sees, in one moment."""
        pair = self.page.evaluate("['video', 'selfview'].map(window.readPicture)")
        if None in pair:
            return None
        made, camera = (np.array(flat, np.float32).reshape(ROWS, COLUMNS, 4)[..., :3] for flat in pair)
        return made, camera

    def rests(self) -> bool:
        """Whether the picture is the same after a moment in which a stream would have shown several frames."""
        before = self.picture()
        time.sleep(0.4)
        after = self.picture()
        return before is not None and after is not None and bool(np.abs(after - before).mean() < 0.5)

    def wait_for_state(self, state: str, limit_s: float = 60.0) -> None:
        def look() -> bool:
            return self.state == state

        try:
            wait_until(look, f"state {state}", limit_s)
        except AssertionError as error:
            raise AssertionError(f"{error}; status: {self.status}; {self.trouble}") from None

    def wait_for_frames(self, count: int = 8) -> None:
        """Until `count` more frames have been decoded."""
        before = self.frames_seen
        wait_until(lambda: self.frames_seen >= before + count, f"{count} more frames")
