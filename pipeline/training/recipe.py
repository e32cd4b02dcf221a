"""`stillstream train`: all stages in order, resumable, from nothing to an exported model.

Stages: autoencoder -> clips -> teacher -> student -> matching -> export. Each has its own folder under `out`; what is
there already is kept, so the same command goes on where it was stopped.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from pipeline.codec import PocketCodec
from pipeline.config import ModelConfig
from pipeline.errors import PipelineError
from pipeline.training.autoencoder import train_autoencoder
from pipeline.training.card import card, record
from pipeline.training.clips import CHUNKS, Clips, encode_clips
from pipeline.training.footage import take_in, told
from pipeline.training.growth import can_grow, grow
from pipeline.training.look import look
from pipeline.training.loop import can_compile
from pipeline.training.matching import train_matching
from pipeline.training.settings import TrainSettings, WanSettings
from pipeline.training.student import train_student
from pipeline.training.teacher import Denoiser, train_teacher
from pipeline.weights import export, load_parts, pocket_folder

STAGES = ("autoencoder", "clips", "teacher", "student", "matching", "export")
TRAINED = ("autoencoder", "teacher", "student", "matching")


Settings = TypeVar("Settings", TrainSettings, WanSettings)


def scaled(settings: Settings, budget_s: float | None) -> Settings:
    """The same run in another time: every trained stage keeps its share. Raises PipelineError `budget_invalid`."""
    if budget_s is None:
        return settings
    if budget_s <= 0:
        raise PipelineError("budget_invalid", f"A budget of {budget_s} s trains nothing.", "Give a positive time.")
    stages = {name: getattr(settings, name) for name in TRAINED if hasattr(settings, name)}
    stages = {name: stage for name, stage in stages.items() if getattr(stage, "on", True)}
    share = budget_s / sum(stage.budget_s for stage in stages.values())
    return replace(
        settings, **{name: replace(stage, budget_s=stage.budget_s * share) for name, stage in stages.items()}
    )


def begin(start: str | None, config: ModelConfig) -> tuple[PocketCodec | None, dict[str, Tensor] | None]:
    """A codec and a denoiser's weights to begin with. The text encoder comes along where the words are the same; a
    smaller student is grown (`growth.py`).

    Raises PipelineError `start_of_another_model`, and what `weights.load_parts` raises.
    """
    if start is None:
        return None, None
    known, codec, text, student = load_parts(pocket_folder() if start == "pocket" else Path(start))
    if known.codec != config.codec or not can_grow(known, config):
        raise PipelineError(
            "start_of_another_model",
            f"The model in {start} has other sizes than the one that is to be trained, and cannot grow into it.",
            "Take its sizes over in [model] (num_layers and ffn_dim may be larger), or leave `start` out.",
        )
    weights = {f"student.{name}": value for name, value in grow(student.state_dict(), known, config).items()}
    if known.text == config.text:
        weights |= {f"text.{name}": value for name, value in text.state_dict().items()}
    return codec, weights


def run(
    out: Path,
    settings: TrainSettings | None = None,
    *,
    budget_s: float | None = None,
    stage: str | None = None,
    threads: int | None = None,
    device: str = "cpu",
) -> None:
    """Train up to and including `stage` (default: all). budget_s: seconds of training in all, drawing not counted.

    Raises PipelineError: `stage_unknown`, `budget_invalid`, `loss_not_finite`, `checkpoint_of_another_stage`,
    `checkpoint_of_another_model`, `disk_full`, and what `footage.take_in` and `begin` raise.
    """
    if stage is not None and stage not in STAGES:
        raise PipelineError("stage_unknown", f"There is no stage {stage!r}.", f"Choose one of {', '.join(STAGES)}.")
    settings = scaled(settings or TrainSettings(), budget_s)
    if threads is not None:
        torch.set_num_threads(threads)
    config, footage = settings.model, None
    if settings.clips.folder is not None:
        shortest = CHUNKS * config.frames_per_chunk
        footage = take_in(Path(settings.clips.folder), out / "footage", config, shortest)
        print(told(footage))
        config = replace(config, text=replace(config.text, words=footage.words()), examples=footage.examples())
    last = STAGES.index(stage) if stage else len(STAGES) - 1
    codec_start, denoiser_start = begin(settings.start, config)

    codec = train_autoencoder(config, out / "autoencoder", settings.autoencoder, footage, codec_start, device=device)
    if last < STAGES.index("clips"):
        return
    if can_compile():
        codec.encoder.compile()
    encode_clips(config, codec, out / "openings", count=settings.clips.openings, seed=10, chunks=1, footage=footage)
    encode_clips(config, codec, out / "clips", count=settings.clips.clips, seed=11, footage=footage)
    if last < STAGES.index("teacher"):
        return
    openings, clips = Clips(out / "openings", config, seed=12), Clips(out / "clips", config, seed=13)

    def sample(denoiser: Denoiser, folder: Path) -> Path:
        return look(config, codec, denoiser.text, denoiser.student, folder)

    if settings.student.target == "start":
        teacher = Denoiser(config)
        teacher.load_state_dict(denoiser_start or {})
        teacher.eval().requires_grad_(False)
    else:
        teacher = train_teacher(
            config, openings, clips, out / "teacher", settings.teacher, denoiser_start, sample=sample, device=device
        )
    if last < STAGES.index("student"):
        return
    distilled = out / "student"
    student = train_student(config, openings, clips, teacher, distilled, settings.student, sample=sample, device=device)
    if last < STAGES.index("matching"):
        return
    if settings.matching.on:
        matched, how = out / "matching", settings.matching
        student = train_matching(config, clips, teacher, student, matched, how, sample=sample, device=device)
    if last < STAGES.index("export"):
        return
    export(out / "export", config, codec, student.text, student.student)
    found = {name: record(out / name) for name in TRAINED}
    records = {name: made for name, made in found.items() if made is not None}
    parts = {"codec": codec, "text": student.text, "student": student.student}
    (out / "export" / "README.md").write_text(card(config, settings, parts, records, device))
    made = {name: value for name, value in asdict(settings).items() if name != "model"}
    (out / "export" / "training.json").write_text(json.dumps(made, indent=2) + "\n")
