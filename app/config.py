"""The settings of a server: few, typed, strict. Only `app.cli` makes one; nothing else reads the environment."""

import re
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from app.worker import default_threads

# TURN wants a name and a password, which a plain address cannot carry.
_STUN = re.compile(r"stuns?:(?:[\w.-]+|\[[0-9a-fA-F:]+\])(?::\d{1,5})?")


class Settings(BaseSettings):
    """Each field can be set by a flag of `stillstream serve` or by STILLSTREAM_<FIELD>."""

    model_config = SettingsConfigDict(env_prefix="STILLSTREAM_", extra="forbid", frozen=True)

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    model: Path | None = Field(None, description="a folder, or a name; none: the embedded pocket student")
    like: str | None = Field(None, description="the family that a student of your own is run as, if it does not say")
    size: str | None = Field(None, description="of the picture, as 832x480; only for models that know many")
    decoder: Literal["tiny", "full"] = Field("tiny", description="codec of Wan models: quick, or exact")
    bits: int = Field(16, ge=8, le=16, multiple_of=8, description="of a Wan student's layers: 16 or 8")
    text_bits: int = Field(16, ge=8, le=16, multiple_of=8, description="of Wan's text encoder's weights: 16 or 8")
    text_device: str = Field("auto", description="where Wan's text encoder is: auto, cpu, swap, or a device as cuda:1")
    lora: Annotated[tuple[Path, ...], NoDecode] = Field((), description="files of low-rank weights, with commas")
    lora_strength: float = Field(1.0, ge=0, le=4, description="how strongly the first of them is worn")
    accept_licence: bool = Field(False, description="a yes to the model's licence, where it wants one")
    device: str = "cpu"
    threads: int | None = Field(None, ge=1, le=256, description="none: by the cores this process may use")
    workers: int = Field(1, ge=1, le=16, description="worker processes; each serves one viewer at a time")
    queue: int = Field(4, ge=0, le=64, description="viewers who may wait for a place")
    hosts: Annotated[tuple[str, ...], NoDecode] = Field((), description="names that the server goes by, with commas")
    ice_servers: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="like stun:host:3478, with commas between"
    )
    silent_s: float = Field(15.0, gt=0, description="a connection that says nothing for this long is closed")
    connect_s: float = Field(20.0, gt=0, description="a peer whose media does not connect in this time is closed")
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @property
    def chosen_threads(self) -> int:
        """Of each worker."""
        return self.threads or default_threads(self.workers)

    @property
    def loopback(self) -> bool:
        """Whether only this machine can connect."""
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @field_validator("hosts", "ice_servers", "lora", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("ice_servers")
    @classmethod
    def _check(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        for url in urls:
            if not _STUN.fullmatch(url):
                raise ValueError("an ICE server looks like stun:host or stun:host:3478")
        return urls
