"""`stillstream serve`: bind the port, run uvicorn, end cleanly. Knows sockets and signals, no streams."""

import errno
import logging
import socket
from collections.abc import Callable
from contextlib import suppress

import uvicorn
from fastapi import FastAPI

from app.config import Settings
from app.errors import AppError
from app.server import create_app
from app.worker import EngineFactory

MESSAGE_LIMIT_BYTES = 1 << 20
GRACE_S = 5


def bind(host: str, port: int) -> socket.socket:
    """A listening address of our own, so that a taken port is known before anything is loaded.

    Raises AppError (`port_taken`, `address_unusable`).
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise AppError(
                "port_taken",
                f"Port {port} on {host} is taken by another program.",
                "Stop it, or choose another port with --port.",
            ) from error
        why = (error.strerror or str(error)).lower()
        raise AppError(
            "address_unusable", f"{host}:{port} cannot be used: {why}.", "Name an address of this machine."
        ) from error
    return listener


def uvicorn_config(app: FastAPI) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        ws="websockets-sansio",
        ws_max_size=MESSAGE_LIMIT_BYTES,
        timeout_graceful_shutdown=GRACE_S,
    )


class AnnouncingServer(uvicorn.Server):
    """Tells where the page is, once it can be fetched."""

    def __init__(self, config: uvicorn.Config, on_started: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_started = on_started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_started()


def serve(settings: Settings, factory: EngineFactory, on_url: Callable[[str], None]) -> None:
    """Serve until a signal comes. on_url: told where the page is.

    Raises AppError, and whatever the engine says when it cannot load.
    """
    failures: list[Exception] = []

    def give_up(error: Exception) -> None:
        failures.append(error)
        server.should_exit = True

    with bind(settings.host, settings.port) as listener:
        app = create_app(settings, factory, on_failure=give_up)
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        url = f"http://{host}:{listener.getsockname()[1]}"
        server = AnnouncingServer(uvicorn_config(app), lambda: on_url(url))
        logging.getLogger("uvicorn").setLevel(logging.WARNING)
        with suppress(KeyboardInterrupt):  # uvicorn raises the signal again once all is down
            server.run(sockets=[listener])
    if failures:
        raise failures[0]
