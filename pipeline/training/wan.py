"""`train --config` with `recipe = "wan"`: a causal teacher and a few-step student of a Wan model, from encoded clips.

Stages: teacher -> student -> export. Each leaves its checkpoint and its averaged transformer, in diffusers' layout, in
its folder under `out`; the next begins from that. Run it under torchrun to share the work; the same command goes on
where it was stopped.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.codec import PocketCodec
from pipeline.config import ModelConfig
from pipeline.convert import seal
from pipeline.errors import PipelineError
from pipeline.student import Student
from pipeline.text import TextEncoder
from pipeline.training.loop import Loss
from pipeline.training.lora import Adapters, adapt, merge
from pipeline.training.parallel import Ranks, ShardedTrainer, joined, shard
from pipeline.training.precomputed import Precomputed
from pipeline.training.settings import WanSettings, WanStageSettings
from pipeline.training.wan_stages import Forced, distilling, teaching
from pipeline.weights import export, load_parts, load_transformer, save_transformer

STAGES = ("teacher", "student", "export")
Beside = tuple[PocketCodec, TextEncoder]


def run_wan(
    out: Path, settings: WanSettings, *, stage: str | None = None, threads: int | None = None, device: str = "cpu"
) -> None:
    """Train up to and including `stage` (default: all).

    Raises PipelineError: `stage_unknown`, `batch_uneven`, `data_empty`, `data_invalid`, `export_mismatch`, and what
    `Trainer` and `weights` raise.
    """
    if stage is not None and stage not in STAGES:
        raise PipelineError("stage_unknown", f"There is no stage {stage!r}.", f"Choose one of {', '.join(STAGES)}.")
    if threads is not None:
        torch.set_num_threads(threads)
    last = STAGES.index(stage) if stage else len(STAGES) - 1
    beside = _beside(settings)
    with joined(device) as ranks:
        for name in ("teacher", "student"):
            _divides(name, getattr(settings, name).batch, ranks)
        data = Precomputed(settings.data, settings.model, settings.seed)
        _teacher(out / "teacher", settings, data, ranks)
        if last >= STAGES.index("student"):
            _student(out / "student", out / "teacher" / "transformer", settings, data, ranks)
        if last >= STAGES.index("export") and ranks.first:
            _export(out / "export", out / "student" / "transformer", settings, beside)
        ranks.wait()


def _teacher(folder: Path, settings: WanSettings, data: Precomputed, ranks: Ranks) -> None:
    def loss(model: Forced) -> Loss:
        return teaching(model, data, settings.teacher, ranks)

    _stage("teacher", folder, settings.transformer, settings, settings.teacher, ranks, loss)


def _student(folder: Path, teacher: Path, settings: WanSettings, data: Precomputed, ranks: Ranks) -> None:
    frozen = Forced(load_transformer(teacher, settings.model.student).requires_grad_(False), settings.model)
    shard(frozen, frozen.student, ranks, precision=settings.precision, checkpointing=False)

    def loss(model: Forced) -> Loss:
        return distilling(model, frozen, data, settings.student, ranks)

    _stage("student", folder, teacher, settings, settings.student, ranks, loss)


def _stage(
    name: str,
    folder: Path,
    start: Path | None,
    settings: WanSettings,
    stage: WanStageSettings,
    ranks: Ranks,
    make_loss: Callable[[Forced], Loss],
) -> None:
    """Train from the transformer in `start`, and leave the average beside the checkpoint."""
    torch.manual_seed(settings.seed)  # the same start in all processes
    student = _started(start, settings)
    model = Forced(student, settings.model)
    shard(model, student, ranks, precision=settings.precision, checkpointing=settings.checkpointing)
    learning: nn.Module = Adapters(student) if settings.lora.rank else student
    trainer = ShardedTrainer(name, folder, learning.train(), stage, ranks)
    trainer.fit(make_loss(model))
    averaged = trainer.average()
    if ranks.first:
        save_transformer(folder / "transformer", _filled(averaged, start, settings))
    ranks.wait()


def _started(start: Path | None, settings: WanSettings) -> Student:
    student = load_transformer(start, settings.model.student) if start else Student(settings.model.student)
    if settings.lora.rank:
        adapt(student, settings.lora)
    return student


def _filled(values: dict[str, Tensor], start: Path | None, settings: WanSettings) -> Student:
    """A transformer with what was learnt, whole and with nothing beside its layers."""
    student = _started(start, settings)
    (Adapters(student) if settings.lora.rank else student).load_state_dict(values)
    merge(student)
    return student.eval().requires_grad_(False)


def _export(folder: Path, transformer: Path, settings: WanSettings, beside: Beside | None) -> None:
    """The transformer as diffusers reads it, sealed, with how it is run where Wan's parts are to complete it; and the
    folder that the engine reads, where its other parts are named.
    """
    student = load_transformer(transformer, settings.model.student)
    save_transformer(folder / "transformer", student)
    seal(folder / "transformer", {"recipe": "wan"}, settings.model if beside is None else None)
    if beside is not None:
        export(folder, settings.model, *beside, student)
    made = {name: value for name, value in asdict(settings).items() if name != "model"}
    (folder / "training.json").write_text(json.dumps(made, indent=2, default=str) + "\n")


def _beside(settings: WanSettings) -> Beside | None:
    """Codec and text encoder that complete the export. Looked at first: training takes long."""
    if settings.beside is None:
        return None
    theirs, codec, text, _ = load_parts(settings.beside)
    if not _completes(theirs, settings.model):
        raise PipelineError(
            "export_mismatch",
            f"The codec and text encoder in {settings.beside} are not those that the run's model describes.",
            "Leave [model.codec], [model.text] and text_dim out: the folder tells them.",
        )
    return codec, text


def _completes(theirs: ModelConfig, ours: ModelConfig) -> bool:
    same_parts = (theirs.codec, theirs.text) == (ours.codec, ours.text)
    return same_parts and theirs.student.text_dim == ours.student.text_dim


def _divides(name: str, batch: int, ranks: Ranks) -> None:
    if batch % ranks.count:
        raise PipelineError(
            "batch_uneven",
            f"The {name}'s batch of {batch} has no equal shares for {ranks.count} processes.",
            f"Choose a multiple of {ranks.count} as batch.",
        )
