"""The settings of a server: few, typed, strict. Only `app.cli` makes one; nothing else reads the environment."""

from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """Each field can be set by a flag of `stillstream serve` or by STILLSTREAM_<FIELD>."""

    model_config = SettingsConfigDict(env_prefix="STILLSTREAM_", extra="forbid", frozen=True)

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    model: Path | None = Field(None, description="a model folder; none: the embedded pocket student")
    device: str = "cpu"
    threads: int | None = Field(None, ge=1, le=256, description="none: by the cores this process may use")
    workers: int = Field(1, ge=1, le=16, description="worker processes; each serves one viewer at a time")
    queue: int = Field(4, ge=0, le=64, description="viewers who may wait for a place")
    ice_servers: tuple[str, ...] = Field((), description="STUN or TURN addresses for peers and page")
    silent_s: float = Field(15.0, gt=0, description="a connection that says nothing for this long is closed")
    connect_s: float = Field(20.0, gt=0, description="a peer whose media does not connect in this time is closed")
    log_level: Literal["debug", "info", "warning", "error"] = "info"
