"""A real server as a process of its own, and a camera clip for the browser. Knows nothing of the page."""

import json
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from tests.e2e.viewer import wait_until

COMMAND = (sys.executable, "-m", "app", "serve")
CLIP_WIDTH, CLIP_HEIGHT, CLIP_FPS, CLIP_FRAMES = 320, 192, 16, 96
SQUARE = 56


@dataclass(frozen=True)
class Server:
    """A running `stillstream serve`."""

    url: str
    process: psutil.Process

    def health(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.url}/api/health", timeout=10) as answer:
            return dict(json.load(answer))

    def open_sessions(self) -> int:
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        return int(float(next(line.split()[1] for line in lines if line.startswith("stillstream_sessions "))))

    def worker(self) -> psutil.Process:
        """The process that generates."""
        children = self.process.children(recursive=True)
        return next(child for child in children if "spawn_main" in " ".join(child.cmdline()))


@contextmanager
def serving(
    log_path: Path, command: tuple[str, ...] = COMMAND, environment: dict[str, str] | None = None
) -> Iterator[Server]:
    """A warm server on a free port. Its log may hold no stack trace."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with log_path.open("wb") as log:
        process = subprocess.Popen([*command, "--port", str(port)], stdout=log, stderr=log, env=environment)
    server = Server(f"http://127.0.0.1:{port}", psutil.Process(process.pid))

    def ready() -> bool:
        assert process.poll() is None, f"the server ended early:\n{log_path.read_text()}"
        try:
            return bool(server.health()["status"] == "ready")
        except OSError:
            return False

    try:
        wait_until(ready, "a warm server", 120)
        yield server
    finally:
        process.terminate()
        process.wait(30)
    assert "Traceback" not in log_path.read_text(), log_path.read_text()


def write_clip(path: Path) -> None:
    """A camera clip (YUV4MPEG2): a bright square crosses a dark room, stepping down as it comes back."""
    with path.open("wb") as file:
        file.write(f"YUV4MPEG2 W{CLIP_WIDTH} H{CLIP_HEIGHT} F{CLIP_FPS}:1 Ip A1:1 C420mpeg2\n".encode())
        chroma = np.full(CLIP_WIDTH * CLIP_HEIGHT // 2, 128, np.uint8).tobytes()
        for index in range(CLIP_FRAMES):
            luma = np.full((CLIP_HEIGHT, CLIP_WIDTH), 40, np.uint8)
            turn = 2 * np.pi * index / CLIP_FRAMES
            x = round((CLIP_WIDTH - SQUARE) * (0.5 - 0.5 * np.cos(turn)))
            y = round((CLIP_HEIGHT - SQUARE) * (0.5 + 0.35 * np.sin(turn)))
            luma[y : y + SQUARE, x : x + SQUARE] = 230
            file.write(b"FRAME\n" + luma.tobytes() + chroma)
