"""The card of an exported model: what it is, how it was trained, for how long, on what. Says only what is recorded."""

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from pipeline.config import ModelConfig
from pipeline.training.settings import StageSettings, TrainSettings

STAGES = {
    "autoencoder": "crops of pictures: L1, squared error and differences on lightly noised latents",
    "teacher": "flow matching with a level per chunk, forced on an imperfect past: true, or drawn by the model",
    "student": "each of the few passes learns where the teacher's guided walk ends from what the pass really meets",
    "matching": "self-forced rollouts, scored by the difference between the guided teacher and a critic",
}


@dataclass(frozen=True)
class Record:
    """What a stage's checkpoint says of itself."""

    steps: int
    trained_s: float


def record(folder: Path) -> Record | None:
    """None: the stage was not run."""
    path = folder / "checkpoint.pt"
    if not path.is_file():
        return None
    saved = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    return Record(saved["step"], saved["trained_s"])


def card(
    config: ModelConfig,
    settings: TrainSettings,
    parts: Mapping[str, nn.Module],
    records: Mapping[str, Record],
    device: str,
) -> str:
    """Markdown. parts: the exported modules by file name. records: the stages that were run, in order."""
    steps = ", ".join(str(step) for step in config.sampler.steps)
    source = f"the clips in `{Path(settings.clips.folder).name}`" if settings.clips.folder else "the procedural world"
    lines = [
        f"# {config.name}",
        "",
        f"{config.width} x {config.height} pixels at {config.fps} frames per second; a chunk is {config.chunk} latent "
        f"frames ({config.frames_per_chunk} pictures) of {config.tokens_per_frame} tokens each. Denoise passes at the "
        f"positions {steps} of 1000, shift {config.sampler.shift:g}, then one cache pass.",
        "",
        "| part | parameters |",
        "|---|---:|",
        *(f"| `{name}.safetensors` | {_millions(part)} |" for name, part in parts.items()),
        "",
        "## How it was trained",
        "",
        f"By `stillstream train`, on {source} and, for the autoencoder, generic procedural pictures beside it: "
        f"{settings.clips.openings} openings of one chunk and {settings.clips.clips} clips. {_start(settings)}"
        f"Torch {torch.__version__} on {_machine(device)}.",
        "",
        "| stage | what | steps | time | settings |",
        "|---|---|---:|---:|---|",
        *(_row(name, records[name], getattr(settings, name)) for name in STAGES if name in records),
        "",
        "Weights are stored in half precision, statistics in single; computed in single, the codec in bfloat16 on CPUs "
        "with tiles for it (AMX). `checksums.json` holds the SHA-256 of each part, `training.json` all settings.",
    ]
    return "\n".join(lines) + "\n"


def _start(settings: TrainSettings) -> str:
    if settings.start is None:
        return ""
    name = "the embedded model" if settings.start == "pocket" else f"`{Path(settings.start).name}`"
    kept = "; its codec stayed as it was" if settings.autoencoder.keep else ""
    return f"It began with the weights of {name}{kept}. "


def _row(name: str, made: Record, settings: StageSettings) -> str:
    default = asdict(StageSettings())
    shown = {key: value for key, value in asdict(settings).items() if value != default.get(key)}
    shown.pop("budget_s", None)
    told = ", ".join(
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in shown.items()
    )
    return f"| {name} | {STAGES[name]} | {made.steps:,} | {made.trained_s:,.0f} s | {told} |"


def _millions(part: nn.Module) -> str:
    return f"{sum(value.numel() for value in part.parameters()) / 1e6:.1f} M"


def _machine(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} threads of a {platform.machine()} CPU"
