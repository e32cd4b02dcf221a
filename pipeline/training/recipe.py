"""`stillstream train`: all stages of the pocket student in order, resumable, from nothing to an exported model.

Stages: autoencoder -> clips -> teacher -> student -> export. Each has its own folder under `out` and its own share of
the budget; what is there already is kept, so the same command goes on where it was stopped.
"""

from dataclasses import replace
from pathlib import Path

import torch

from pipeline.codec import PocketCodec
from pipeline.config import ModelConfig, TextConfig
from pipeline.training import captions
from pipeline.training.autoencoder import train_autoencoder
from pipeline.training.loop import StageSettings

STAGES = ("autoencoder", "clips", "teacher", "student", "export")
SHARES = {"autoencoder": 0.25, "teacher": 0.45, "student": 0.3}
DEFAULT_BUDGET_S = 6000.0
CLIP_COUNT = 6000


def pocket_config() -> ModelConfig:
    """The configuration of the embedded model."""
    return ModelConfig(text=TextConfig(words=captions.WORDS))


def run(out: Path, budget_s: float | None = None, stage: str | None = None, threads: int | None = None) -> None:
    """Train up to and including `stage` (default: all)."""
    if threads is not None:
        torch.set_num_threads(threads)
    total_s = budget_s or DEFAULT_BUDGET_S
    config = pocket_config()
    wanted = STAGES[: STAGES.index(stage) + 1] if stage else STAGES
    codec = _codec(config, out, total_s)
    if wanted[-1] == "autoencoder":
        return
    raise SystemExit(repr(codec.config))


def _codec(config: ModelConfig, out: Path, total_s: float) -> PocketCodec:
    settings = StageSettings(SHARES["autoencoder"] * total_s, learning_rate=6e-4)
    return train_autoencoder(config, out / "autoencoder", replace(settings, ema=0.998))
