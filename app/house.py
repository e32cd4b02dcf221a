"""What all sessions of a server share, and what a session asks of its page and of its peer. Runs nothing."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Protocol

from app.admission import Admission
from app.feed import Track
from app.metrics import Metrics
from pipeline.chunk import Chunk, Controls
from pipeline.config import ModelConfig


class ChannelClosedError(Exception):
    """The page has gone."""


class Channel(Protocol):
    """A page that can be spoken to. send never waits."""

    async def receive(self) -> str: ...
    def send(self, message: dict[str, Any]) -> None: ...


class PeerLike(Protocol):
    """What a session asks of `streaming.peer.Peer`."""

    @property
    def track(self) -> "CountingTrack": ...
    async def answer(self, offer_sdp: str) -> str: ...
    async def add_candidate(self, candidate: dict[str, Any] | None) -> None: ...
    async def close(self) -> None: ...


class CountingTrack(Track, Protocol):
    frames_shown: int
    frames_dropped: int

    @property
    def queue_frames(self) -> int: ...


@dataclass(frozen=True)
class House:
    """What all sessions of a server share."""

    config: ModelConfig
    admission: Admission[Any]
    make_peer: Callable[..., PeerLike]
    metrics: Metrics = field(default_factory=Metrics)
    lag_ms: Callable[[], float] = lambda: 0.0
    ice_servers: Sequence[str] = ()
    silent_s: float = 15.0
    connect_s: float = 20.0
    clock: Callable[[], float] = monotonic
    sleep: Callable[[float], Coroutine[Any, Any, None]] = asyncio.sleep


WISHES = (
    "prompt",
    "seed",
    "strength",
    "structure",
    "regions",
    "paint",
    "transition",
    "glide_chunks",
    "steps",
    "lora",
    "lora_strength",
    "motion_aware",
)
"""What a page may ask for, in the words of `Controls`."""


def describe(config: ModelConfig) -> dict[str, Any]:
    """The model as the page needs to know it."""
    names = ("name", "width", "height", "fps", "frames_per_chunk", "prompt_limit")
    able = {
        "structure": config.student.control_channels > 0,
        "tiles": config.tiles,
        "loras": list(config.loras),
        "any_steps": config.sampler.any_steps,
    }
    return {name: getattr(config, name) for name in names} | {"examples": list(config.examples)} | able


def told_tiles(chunk: Chunk) -> dict[str, Any]:
    """Which tiles of a chunk were computed: one 0 or 1 for each, row by row; empty: all."""
    if chunk.active_HW is None:
        return {"active": "", "active_fraction": 1.0}
    cells = "".join("1" if cell else "0" for cell in chunk.active_HW.flat)
    return {"active": cells, "active_fraction": round(float(chunk.active_HW.mean()), 3)}


def defaults(config: ModelConfig) -> dict[str, Any]:
    """What is drawn until the page says otherwise."""
    start = Controls(
        prompt=config.examples[0] if config.examples else "",
        transition=config.transition,
        lora=config.loras[0] if config.loras else "",
        lora_strength=config.lora_strength,
        motion_aware=config.motion_aware,
    )
    return {name: getattr(start, name) for name in WISHES if name != "paint"}
