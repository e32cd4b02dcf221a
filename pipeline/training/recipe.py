"""`stillstream train`: all stages in order, resumable, from nothing to an exported model.

Stages: autoencoder -> clips -> teacher -> student -> matching -> export. Each has its own folder under `out`; what is
there already is kept, so the same command goes on where it was stopped.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TypeVar

import torch

from pipeline.errors import PipelineError
from pipeline.training.autoencoder import train_autoencoder
from pipeline.training.clips import Clips, encode_clips
from pipeline.training.look import look
from pipeline.training.matching import train_matching
from pipeline.training.settings import TrainSettings, WanSettings
from pipeline.training.student import train_student
from pipeline.training.teacher import train_teacher
from pipeline.weights import export

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
    share = budget_s / sum(stage.budget_s for stage in stages.values())
    return replace(
        settings, **{name: replace(stage, budget_s=stage.budget_s * share) for name, stage in stages.items()}
    )


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
    `checkpoint_of_another_model`, `disk_full`.
    """
    if stage is not None and stage not in STAGES:
        raise PipelineError("stage_unknown", f"There is no stage {stage!r}.", f"Choose one of {', '.join(STAGES)}.")
    settings = scaled(settings or TrainSettings(), budget_s)
    if threads is not None:
        torch.set_num_threads(threads)
    config = settings.model
    last = STAGES.index(stage) if stage else len(STAGES) - 1

    codec = train_autoencoder(config, out / "autoencoder", settings.autoencoder, device=device)
    if last < STAGES.index("clips"):
        return
    encode_clips(config, codec, out / "openings", count=settings.clips.openings, seed=10, chunks=1)
    encode_clips(config, codec, out / "clips", count=settings.clips.clips, seed=11)
    if last < STAGES.index("teacher"):
        return
    openings, clips = Clips(out / "openings", config, seed=12), Clips(out / "clips", config, seed=13)
    teacher = train_teacher(config, openings, clips, out / "teacher", settings.teacher, device=device)
    many = replace(config, sampler=replace(config.sampler, steps=tuple(range(1000, 0, -20))))
    look(many, codec, teacher.text, teacher.student, out / "teacher" / "look.png")
    if last < STAGES.index("student"):
        return
    student = train_student(config, openings, clips, teacher, out / "student", settings.student, device=device)
    look(config, codec, student.text, student.student, out / "student" / "look.png")
    if last < STAGES.index("matching"):
        return
    student = train_matching(config, clips, teacher, student, out / "matching", settings.matching, device=device)
    look(config, codec, student.text, student.student, out / "matching" / "look.png")
    if last < STAGES.index("export"):
        return
    export(out / "export", config, codec, student.text, student.student)
    made = {name: value for name, value in asdict(settings).items() if name != "model"}
    (out / "export" / "training.json").write_text(json.dumps(made, indent=2) + "\n")
