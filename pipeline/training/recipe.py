"""`stillstream train`: all stages of the pocket student in order, resumable, from nothing to an exported model.

Stages: autoencoder -> clips -> teacher -> student -> export. Each has its own folder under `out` and its own share of
the budget; what is there already is kept, so the same command goes on where it was stopped.
"""

import json
from dataclasses import replace
from pathlib import Path

import torch

from pipeline.config import CodecConfig, ModelConfig, SamplerConfig, StudentConfig, TextConfig
from pipeline.errors import PipelineError
from pipeline.training import captions
from pipeline.training.autoencoder import train_autoencoder
from pipeline.training.clips import Clips, encode_clips
from pipeline.training.look import look
from pipeline.training.loop import StageSettings
from pipeline.training.student import train_student
from pipeline.training.teacher import train_teacher
from pipeline.weights import export

STAGES = ("autoencoder", "clips", "teacher", "student", "export")
BUDGET_S = {"autoencoder": 1500.0, "teacher": 3000.0, "student": 1500.0}
OPENING_COUNT, CLIP_COUNT = 6000, 3200
EXAMPLES = (
    "a red ball bounces on the beach",
    "a blue fish moves left under water, neon style",
    "a yellow star circles in the city at night",
    "an orange robot sways on a stage in front of an audience",
    "a pink heart moves right in the snow, pastel",
    "a green flower stands still in the park, pencil sketch",
)


def pocket_config() -> ModelConfig:
    """The configuration of the embedded model."""
    codec = CodecConfig(latent_channels=32)
    student = StudentConfig(in_channels=32 + 12, out_channels=32, position_channels=12)
    return ModelConfig(
        examples=EXAMPLES,
        codec=codec,
        student=student,
        text=TextConfig(words=captions.WORDS),
        sampler=SamplerConfig(prediction="clean"),
    )


def run(
    out: Path,
    budget_s: float | None = None,
    stage: str | None = None,
    threads: int | None = None,
    device: str = "cpu",
) -> None:
    """Train up to and including `stage` (default: all). budget_s: seconds of training in all, drawing not counted.

    Raises PipelineError: `stage_unknown`, `budget_invalid`, `loss_not_finite`, `checkpoint_of_another_stage`.
    """
    if stage is not None and stage not in STAGES:
        raise PipelineError("stage_unknown", f"There is no stage {stage!r}.", f"Choose one of {', '.join(STAGES)}.")
    total_s = sum(BUDGET_S.values()) if budget_s is None else budget_s
    if total_s <= 0:
        raise PipelineError("budget_invalid", f"A budget of {total_s} s trains nothing.", "Give a positive time.")
    if threads is not None:
        torch.set_num_threads(threads)
    scale = total_s / sum(BUDGET_S.values())
    config = pocket_config()
    last = STAGES.index(stage) if stage else len(STAGES) - 1

    def settings(name: str, learning_rate: float, ema: float, muon: bool = False) -> StageSettings:
        return StageSettings(BUDGET_S[name] * scale, learning_rate, ema=ema, muon=muon)

    codec = train_autoencoder(config, out / "autoencoder", settings("autoencoder", 6e-4, 0.998), device=device)
    if last < STAGES.index("clips"):
        return
    encode_clips(config, codec, out / "openings", count=OPENING_COUNT, seed=10, chunks=1)
    encode_clips(config, codec, out / "clips", count=CLIP_COUNT, seed=11)
    if last < STAGES.index("teacher"):
        return
    openings, clips = Clips(out / "openings", config, seed=12), Clips(out / "clips", config, seed=13)
    teach = settings("teacher", 2e-3, 0.998, muon=True)
    teacher = train_teacher(config, openings, clips, out / "teacher", teach, device=device)
    many = replace(config, sampler=replace(config.sampler, steps=tuple(range(1000, 0, -20))))
    look(many, codec, teacher.text, teacher.student, out / "teacher" / "look.png")
    if last < STAGES.index("student"):
        return
    distil = settings("student", 3e-4, 0.99, muon=True)
    student = train_student(config, openings, clips, teacher, out / "student", distil, device=device)
    look(config, codec, student.text, student.student, out / "student" / "look.png")
    if last < STAGES.index("export"):
        return
    export(out / "export", config, codec, student.text, student.student)
    (out / "export" / "training.json").write_text(
        json.dumps({name: share * scale for name, share in BUDGET_S.items()}, indent=2) + "\n"
    )
