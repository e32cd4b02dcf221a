"""A clock that training cannot hurry, a few encoded clips of the tiny model, and a run of it as of a Wan model."""

from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipeline.codec import PocketCodec
from pipeline.config import ModelConfig
from pipeline.student import Student
from pipeline.text import TextEncoder
from pipeline.training import loop
from pipeline.training.clips import encode_clips
from pipeline.training.precomputed import UNPROMPTED, write_clip, write_unprompted
from pipeline.training.settings import WanSettings, WanStageSettings
from pipeline.training.teacher import Denoiser
from pipeline.weights import export, save_transformer
from tests.pipeline.conftest import stir


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


@pytest.fixture(scope="module")
def knowing(config: ModelConfig) -> Denoiser:
    """A teacher that says something: fresh ones start at zero."""
    torch.manual_seed(4)
    made = Denoiser(config)
    stir(made, 0.15)
    return made.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def precomputed(config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six clips of three chunks: half of them with a prompt per chunk, in the kinds of float that there are."""
    folder = tmp_path_factory.mktemp("precomputed")
    draw = torch.Generator().manual_seed(5)
    for index, kind in enumerate((torch.float16, torch.bfloat16, torch.float32) * 2):
        shape = (3 * config.chunk, config.codec.latent_channels, *config.latent_size)
        text = (1 + index % 2 * 2, 2 + index % 3, config.student.text_dim)
        latents, words = (torch.randn(size, generator=draw).to(kind) for size in (shape, text))
        write_clip(folder / f"{index:05}.safetensors", latents, words)
    write_unprompted(folder / UNPROMPTED, torch.randn(1, 1, config.student.text_dim, generator=draw))
    return folder


@pytest.fixture(scope="session")
def wan_run(
    config: ModelConfig,
    codec: PocketCodec,
    text: TextEncoder,
    student: Student,
    precomputed: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> WanSettings:
    """A run that ends by steps, in single precision so that it can be compared, with a checkpoint after each step."""
    folder = tmp_path_factory.mktemp("wan")
    save_transformer(folder / "transformer", student)
    export(folder / "beside", config, codec, text, student)
    stage = WanStageSettings(
        budget_s=1e9, steps=6, learning_rate=3e-3, warm_up_steps=2, ema=0.5, save_s=1e-9, batch=4, guidance=2.0
    )
    return WanSettings(
        model=config,
        data=precomputed,
        transformer=folder / "transformer",
        beside=folder / "beside",
        precision="fp32",
        seed=3,
        teacher=stage,
        student=stage,
    )
