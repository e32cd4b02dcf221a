"""The whole journey of a chunk, seen from a browser: a real server, the embedded student, a real Chromium."""

import json
import time
from collections import deque
from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import WebSocketRoute

from tests.e2e.running import Server
from tests.e2e.viewer import COLUMNS, ROWS, Viewer, wait_until

pytestmark = pytest.mark.e2e
OpenPage = Callable[[], Viewer]

DESERT = "a red ball moves right in the desert"
SEA = "a blue fish moves left under water"
DARK_ROOM = "a white box sways in a dark room"


DROP_RED = """async () => {
  const canvas = new OffscreenCanvas(320, 192);
  Object.assign(canvas.getContext("2d"), { fillStyle: "rgb(230, 30, 30)" }).fillRect(0, 0, 320, 192);
  const dataTransfer = new DataTransfer();
  dataTransfer.items.add(new File([await canvas.convertToBlob()], "red.png"));
  document.getElementById("video").dispatchEvent(new DragEvent("drop", { dataTransfer, bubbles: true }));
}"""


def warmth(viewer: Viewer) -> float:
    """Red minus blue over the picture: far above 0 in a desert, far below under water."""
    picture = viewer.picture()
    return 0.0 if picture is None else float((picture[..., 0] - picture[..., 2]).mean())


def bright_middle(picture_HWC: np.ndarray) -> np.ndarray:
    """Where the light is: the middle of the brightest twelfth, (x, y) from 0 to 1."""
    light = picture_HWC.mean(-1)
    weight = np.clip(light - np.quantile(light, 11 / 12), 0, None) + 1e-6
    y, x = np.mgrid[:ROWS, :COLUMNS]
    middle: np.ndarray = np.array([(weight * x).sum() / COLUMNS, (weight * y).sum() / ROWS]) / weight.sum()
    return middle


def test_pressing_start_shows_frames_that_decode_and_change(open_page: OpenPage) -> None:
    viewer = open_page()
    viewer.page.click("#start")
    viewer.wait_for_state("live")
    viewer.wait_for_frames(16)
    first = viewer.picture()
    assert first is not None
    assert first.std() > 8, "the picture is flat"
    wait_until(lambda: np.abs(viewer.picture() - first).max() > 40, "a picture that changed")


def test_the_picture_follows_a_prompt_change_mid_stream(open_page: OpenPage) -> None:
    viewer = open_page()
    viewer.ask(DESERT)
    wait_until(lambda: warmth(viewer) > 20, "the colours of a desert")
    viewer.ask(SEA)
    wait_until(lambda: warmth(viewer) < -20, "the colours of the sea")
    wait_until(lambda: "Applied in" in viewer.page.inner_text("#applied"), "the word that the prompt was applied")
    assert viewer.page.evaluate("window.sockets.length") == 1


def test_words_that_the_model_does_not_know_are_named_until_the_next_prompt(open_page: OpenPage) -> None:
    viewer = open_page()
    viewer.ask("a red zebra in the desert")
    wait_until(lambda: viewer.page.inner_text("#unknown") == "This model does not know: zebra.", "the unknown word")
    viewer.ask(DESERT)
    wait_until(lambda: viewer.page.inner_text("#unknown") == "", "a prompt that is known")


def test_the_camera_shows_up_in_the_picture_where_it_is_and_when(open_page: OpenPage) -> None:
    viewer = open_page()
    viewer.ask(DARK_ROOM)
    viewer.wait_for_state("live")
    assert viewer.page.is_disabled("#structure")
    viewer.page.check("#camera")
    viewer.page.fill("#structure", "0.5")
    viewer.page.fill("#strength", "0.25")
    seen: deque[tuple[float, np.ndarray, np.ndarray]] = deque(maxlen=60)  # time, generated, camera

    def follows() -> bool:
        """Does the light in the picture run the camera's way, later by the same time throughout?"""
        pair = viewer.both_pictures()
        if pair is not None:
            seen.append((time.monotonic(), bright_middle(pair[0]), bright_middle(pair[1])))
        if len(seen) < 30:
            return False
        times_s, made, camera = (np.array(column) for column in zip(*seen, strict=True))
        for lag_s in np.arange(0.0, 2.5, 0.05):
            late = times_s - times_s[0] >= lag_s
            then = np.stack([np.interp(times_s[late] - lag_s, times_s, camera[:, axis]) for axis in (0, 1)], 1)
            if late.sum() > 20 and np.ptp(then[:, 0]) > 0.4 and np.abs(then - made[late]).mean() < 0.08:
                return True
        return False

    wait_until(follows, "a picture that follows the camera", 60, every_s=0.08)


def test_tiles_are_painted_with_the_keys_alone(open_page: OpenPage) -> None:
    viewer = open_page()
    viewer.page.click("#start")
    viewer.wait_for_state("live")
    viewer.page.focus("#paint")
    viewer.page.keyboard.press("Enter")
    assert viewer.page.evaluate("document.activeElement.id") == "tiles"
    for key in ("ArrowDown", "ArrowRight", "ArrowRight", "Space"):
        viewer.page.keyboard.press(key)
    assert viewer.page.inner_text("#brush") == "Row 2, column 3: painted."
    viewer.page.keyboard.press("Space")
    assert viewer.page.inner_text("#brush") == "Row 2, column 3: not painted."


def test_the_dial_fills_the_meter_tiles_are_tinted_and_where_it_is_painted_alone_the_video_changes(
    open_page: OpenPage,
) -> None:
    viewer, slow_s = open_page(), 120
    page = viewer.page
    viewer.ask(DESERT)
    wait_until(lambda: warmth(viewer) > 20, "the colours of a desert", slow_s)
    page.fill("#regions", "0.5")
    wait_until(lambda: "ms a chunk" in page.inner_text("#regions-meter"), "the meter", slow_s)
    page.click("#tint")
    drawn = "Array.from(tiles.getContext('2d').getImageData(0, 0, tiles.width, tiles.height).data).some(Boolean)"
    wait_until(lambda: page.is_visible("#tiles") and page.evaluate(drawn), "tinted tiles", slow_s)

    page.click("#paint")
    box = page.locator("#tiles").bounding_box()
    assert box is not None
    width, height = box["width"] / 10, box["height"] / 6
    page.mouse.move(box["x"] + width / 2, box["y"] + height / 2)
    page.mouse.down()
    for row in range(6):
        for column in range(4):
            page.mouse.move(box["x"] + (column + 0.5) * width, box["y"] + (row + 0.5) * height)
    page.mouse.up()
    wait_until(lambda: "Computed: 40 %" in page.inner_text("#regions-meter"), "the painted tiles alone", slow_s)
    viewer.wait_for_frames()
    before = viewer.picture()
    assert before is not None
    viewer.ask(SEA)
    painted, held = np.s_[:, : COLUMNS * 3 // 10], np.s_[:, COLUMNS // 2 :]

    def changed() -> float:
        """How much colder what is painted has become."""
        now = viewer.picture()
        return 0.0 if now is None else float(((before - now)[painted] @ [1, 0, -1]).mean())

    wait_until(lambda: changed() > 20, "the sea where it is painted", slow_s)
    after = viewer.picture()
    assert after is not None
    assert np.abs(after - before)[held].mean() < 10


def test_closing_the_tab_frees_the_session(open_page: OpenPage, server: Server) -> None:
    viewer = open_page()
    viewer.page.click("#start")
    viewer.wait_for_state("live")
    assert server.open_sessions() == 1
    viewer.leave()
    wait_until(lambda: server.open_sessions() == 0, "the end of the session")


def test_a_second_tab_waits_in_plain_words_and_streams_when_the_first_closes(open_page: OpenPage) -> None:
    first, second = open_page(), open_page()
    first.page.click("#start")
    first.wait_for_state("live")
    second.page.click("#start")
    second.wait_for_state("waiting")
    wait_until(lambda: "number 1 in the queue" in second.status, "the place in the queue")
    wait_until(lambda: "places are taken" in second.trouble, "the word that the server is busy")
    first.leave()
    second.wait_for_state("live")
    second.wait_for_frames()


def test_a_lost_connection_is_made_again_with_the_same_wishes(open_page: OpenPage) -> None:
    viewer = open_page()
    viewer.ask(SEA)
    wait_until(lambda: warmth(viewer) < -20, "the colours of the sea")
    viewer.page.keyboard.press("Escape")
    viewer.page.keyboard.press("i")
    viewer.page.fill("#seed", "41")
    viewer.page.press("#seed", "Tab")
    viewer.page.check("#camera")
    wait_until(lambda: viewer.camera_fps > 0, "camera frames at the server")
    viewer.page.evaluate("window.sockets.at(-1).close()")
    wait_until(lambda: "Trying again" in viewer.status, "the word that it tries again")
    viewer.wait_for_state("live")
    viewer.wait_for_frames()
    wait_until(lambda: viewer.camera_fps > 0, "camera frames at the server again")
    assert viewer.page.evaluate("window.sockets.length") == 2
    assert viewer.page.input_value("#prompt") == SEA
    assert viewer.page.input_value("#seed") == "41"


def test_a_killed_worker_is_replaced_and_the_stream_goes_on(open_page: OpenPage, server: Server) -> None:
    viewer = open_page()
    viewer.ask(DESERT)
    wait_until(lambda: warmth(viewer) > 20, "the colours of a desert")
    server.worker().kill()
    wait_until(lambda: "recovering" in viewer.states, "the word that the generator starts again")
    viewer.wait_for_state("live")
    viewer.wait_for_frames()
    wait_until(lambda: warmth(viewer) > 20, "the colours of a desert again")
    assert viewer.page.evaluate("window.sockets.length") == 1


def test_pause_rests_the_picture_and_going_on_moves_it(open_page: OpenPage) -> None:
    viewer = open_page()
    viewer.page.click("#start")
    viewer.wait_for_state("live")
    viewer.wait_for_frames()
    viewer.page.click("#pause")
    viewer.wait_for_state("paused")
    wait_until(viewer.rests, "a picture at rest")
    viewer.page.click("#pause")
    viewer.wait_for_state("live")
    viewer.wait_for_frames()


@pytest.mark.parametrize(
    ("name", "words"),
    [("NotAllowedError", "may not"), ("NotFoundError", "No camera"), ("NotReadableError", "busy")],
)
def test_a_camera_that_does_not_open_is_explained(open_page: OpenPage, name: str, words: str) -> None:
    viewer = open_page()
    refuse = "(name) => { navigator.mediaDevices.getUserMedia = async () => { throw new DOMException('', name); }; }"
    viewer.page.evaluate(refuse, name)
    viewer.page.click(".switch:has(#camera)")
    wait_until(lambda: words in viewer.trouble, words)
    assert not viewer.page.is_checked("#camera")


@pytest.mark.parametrize(("secure", "words"), [("true", "cannot use a camera"), ("false", "needs a secure page")])
def test_a_browser_that_hides_its_cameras_is_told_why(open_page: OpenPage, secure: str, words: str) -> None:
    viewer = open_page()
    viewer.page.evaluate("Object.defineProperty(navigator, 'mediaDevices', { value: undefined })")
    viewer.page.evaluate(f"Object.defineProperty(window, 'isSecureContext', {{ value: {secure} }})")
    viewer.page.click(".switch:has(#camera)")
    wait_until(lambda: words in viewer.trouble, words)
    assert not viewer.page.is_checked("#camera")


def test_a_browser_without_webrtc_is_told_so(open_page: OpenPage) -> None:
    viewer = open_page()
    viewer.page.add_init_script("delete window.RTCPeerConnection")
    viewer.page.reload()
    wait_until(lambda: "no WebRTC" in viewer.trouble, "the word that there is no WebRTC")
    assert viewer.page.is_disabled("#start")
    viewer.page.click("#trouble-close")
    viewer.ask(DESERT)
    wait_until(lambda: "no WebRTC" in viewer.trouble, "the same word once more")


def test_a_refused_message_is_shown_in_the_server_s_words(open_page: OpenPage) -> None:
    viewer = open_page()
    viewer.page.click("#start")
    viewer.wait_for_state("live")
    viewer.page.evaluate('window.sockets[0].send(\'{"kind": "controls", "id": 900, "strength": 7}\')')
    wait_until(lambda: "strength" in viewer.trouble, "the server's answer")
    assert "{" not in viewer.trouble
    viewer.wait_for_frames()


def test_passes_are_offered_where_the_model_takes_any_number_and_reach_the_server(open_page: OpenPage) -> None:
    page = (viewer := open_page()).page
    page.click("#start")
    viewer.wait_for_state("live")
    assert page.is_hidden("#steps-part"), "the embedded student was made for four"
    sent: list[dict[str, Any]] = []
    heard: list[dict[str, Any]] = []

    def between(socket: WebSocketRoute) -> None:
        server = socket.connect_to_server()

        def down(text: str | bytes) -> None:
            message = json.loads(text)
            heard.append(message)
            if message["kind"] == "welcome":
                message["model"]["any_steps"] = True
            socket.send(json.dumps(message))

        def up(text: str | bytes) -> None:
            sent.append(json.loads(text))
            server.send(text)

        server.on_message(down)
        socket.on_message(up)

    def acked(steps: int) -> bool:
        page.wait_for_timeout(50)  # messages are only handed over while Playwright runs
        acks = {message["id"] for message in heard if message["kind"] == "ack"}
        return any(message.get("steps") == steps and message["id"] in acks for message in sent)

    page.route_web_socket("**", between)
    page.reload()
    page.click("#start")
    viewer.wait_for_state("live")
    assert page.is_visible("#steps-part")
    assert page.inner_text("#steps-value") == "the model's own"
    page.fill("#steps", "4")
    wait_until(lambda: acked(4), "four passes")
    assert page.inner_text("#steps-value") == "4"
    page.fill("#steps", "8")  # which the student behind the welcome does not take
    wait_until(lambda: "knows no other number" in viewer.trouble, "the server's sentence")


def test_a_picture_begins_the_stream_and_what_is_none_is_said_while_it_goes_on(open_page: OpenPage) -> None:
    viewer = open_page()
    choose = viewer.page.locator("#picture-file").set_input_files
    choose({"name": "notes.png", "mimeType": "image/png", "buffer": b"no picture"})  # this starts the stream, too
    wait_until(lambda: "no picture that can be read" in viewer.trouble, "the server's sentence")
    viewer.wait_for_state("live")
    viewer.wait_for_frames()
    assert viewer.page.is_hidden("#unpicture")
    noise_HWC = np.random.default_rng(0).integers(0, 60, (1100, 1600, 3), np.uint8)
    noise_HWC[..., 0] += 190
    file = BytesIO()
    Image.fromarray(noise_HWC).save(file, "PNG")  # 5 MB: the page makes it smaller
    choose({"name": "red.png", "mimeType": "image/png", "buffer": file.getvalue()})
    wait_until(lambda: warmth(viewer) > 110, "a red picture", every_s=0.05)
    assert "red.png" in viewer.page.inner_text("#picture-name")
    assert viewer.trouble == ""
    viewer.page.click("#unpicture")
    wait_until(lambda: warmth(viewer) < 60, "the prompt's own picture")
    assert viewer.page.is_hidden("#unpicture")
    viewer.page.evaluate(DROP_RED)
    wait_until(lambda: warmth(viewer) > 110, "the picture that was dropped", every_s=0.05)


def test_the_page_is_used_from_the_keyboard_alone(open_page: OpenPage) -> None:
    viewer = open_page()
    keyboard, page = viewer.page.keyboard, viewer.page
    keyboard.press("/")
    keyboard.press("Control+A")
    keyboard.type(SEA)
    keyboard.press("Enter")
    viewer.wait_for_state("live")
    keyboard.press("Control+A")
    keyboard.press("Delete")
    keyboard.press("ArrowUp")
    assert page.input_value("#prompt") == SEA
    keyboard.press("Escape")
    keyboard.press("i")
    wait_until(lambda: "fps of 16" in page.inner_text("#overlay"), "the figures")
    keyboard.press("?")
    assert page.is_visible("#help")
    keyboard.press("Escape")
    keyboard.press("s")
    viewer.wait_for_state("idle")


def test_buttons_and_keys_do_what_they_say(open_page: OpenPage) -> None:
    viewer = open_page()
    page = viewer.page
    said: list[str] = []
    page.on("websocket", lambda socket: socket.on("framesent", lambda text: said.append(str(text))))
    wait_until(lambda: page.locator("#examples button").count() > 2, "the examples")
    second = page.locator("#examples button").nth(1)
    example = second.inner_text()
    second.click()
    viewer.wait_for_state("live")
    assert page.input_value("#prompt") == example
    assert page.evaluate("document.activeElement.textContent") == example, "the focus stays where it was"
    page.keyboard.press("p")
    viewer.wait_for_state("paused")
    page.keyboard.press("p")
    viewer.wait_for_state("live")
    seed = page.input_value("#seed")
    page.click("#dice")
    assert page.input_value("#seed") != seed
    viewer.wait_for_frames()
    page.focus("#dice")
    page.keyboard.press("r")
    wait_until(lambda: any('"reset"' in text for text in said), "the reset")
    viewer.wait_for_frames(16)
    page.keyboard.press("c")
    wait_until(lambda: page.is_checked("#camera"), "the camera switched on")
    assert page.locator("#device option").count() >= 1
    page.keyboard.press("c")
    wait_until(lambda: not page.is_checked("#camera"), "the camera switched off")
    assert viewer.trouble == ""


def test_nothing_sticks_out_on_a_narrow_phone(open_page: OpenPage) -> None:
    viewer = open_page()
    viewer.page.set_viewport_size({"width": 360, "height": 740})
    viewer.page.click("#start")
    viewer.wait_for_state("live")
    viewer.page.keyboard.press("i")
    assert viewer.page.evaluate("document.documentElement.scrollWidth") == 360
