"""A clock that training cannot hurry, and a few encoded clips of the tiny model."""

from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.codec import PocketCodec
from pipeline.config import ModelConfig
from pipeline.training import loop
from pipeline.training.clips import encode_clips


@pytest.fixture
def one_second_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every training step takes exactly one second, so budgets and schedules count steps."""
    ticks: Callable[[], int] = count().__next__
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: float(ticks())))


@pytest.fixture(scope="session")
def encoded(config: ModelConfig, codec: PocketCodec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    encode_clips(config, codec, folder, count=10, seed=11)
    return folder


@pytest.fixture(scope="session")
def encoded_openings(config: ModelConfig, codec: PocketCodec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("openings")
    encode_clips(config, codec, folder, count=10, seed=10, chunks=1)
    return folder
