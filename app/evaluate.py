"""`stillstream eval`: measures a model, writes a page with tables, plots and sheets, prints one line of JSON last.

Owns the clock, the files and the progress; what is measured, and how, is the business of `pipeline.training.evaluate`.
A target that is missed is told and is no error.
"""

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from app.bench_engine import cpu_name
from app.clip import replacing
from app.errors import AppError
from app.evaluate_figures import Findings, doubtful, line, rows
from app.evaluate_plots import write_plots
from app.evaluate_report import Told, kept_notes, page
from app.probe import read_probe
from pipeline.engine import Engine
from pipeline.training import asks
from pipeline.training import evaluate as measured
from pipeline.training import evaluate_codec as codec
from pipeline.training.evaluate import Drawn, Pictures, StepsRow, Watch
from pipeline.training.guided import GuidedTeacher, load_teacher
from pipeline.training.probe import Probe, bounds, save_probe, train_probe
from pipeline.training.probe_clips import shrink
from pipeline.training.settings import StageSettings
from pipeline.training.sheet import write_sheet

T = TypeVar("T")

SHEET_PROMPTS, CAMERA_CLIPS, CAMERA_CHUNKS = 24, 5, 4
NOISE_CLIPS = 24  # kept at their full size, 6 MB each
FOLLOWED = ((0.3, 0.0), (0.6, 0.0), (0.9, 1.0))  # strength, structure


@dataclass(frozen=True)
class Plan:
    """How much is measured. sheet: prompts drawn for the contact sheet; the clips that are measured come first."""

    clips: int = 48
    drift_frames: int = 1000
    streams: int = 4
    probe_clips: int = 256
    codec_clips: int = 24
    rounds: int = 5
    quick: bool = False

    @property
    def steps_clips(self) -> int:
        """50 passes are slow: the table of steps is read from the first clips."""
        return max(2, self.clips // 2)

    @property
    def switches(self) -> int:
        return max(2, self.clips // 2)

    @property
    def sheet(self) -> int:
        return self.clips if self.quick else max(SHEET_PROMPTS, self.clips)


QUICK = Plan(clips=6, drift_frames=256, streams=2, probe_clips=32, codec_clips=4, rounds=3, quick=True)


@dataclass(frozen=True)
class Wanted:
    """What to measure and where to write. teacher None: its rows are not measured. probe None: one is trained, in
    `probe_folder`, until `probe_budget_s` of training are spent; what was spent before counts."""

    model: Path | None
    teacher: Path | None
    probe: Path | None
    probe_folder: Path
    probe_budget_s: float
    out: Path
    threads: int
    words: Sequence[str] = ()


@dataclass(frozen=True)
class Sheets:
    prompts: list[list[Pictures]]
    camera: list[list[Pictures]]


def evaluate(wanted: Wanted, plan: Plan) -> None:
    """Raises AppError (`out_unwritable`, `plots_missing`, `probe_unreadable`) and what loading a model raises."""
    folder = prepare(wanted.out)
    console, notes = Console(), Console(stderr=True)
    engine = Engine.load(wanted.model, threads=wanted.threads)
    teacher = load_teacher(wanted.teacher, engine) if wanted.teacher else None
    probe, about = ready_probe(wanted, engine)
    with Progress(console=notes) as progress:

        def watch(items: Sequence[T], text: str) -> Iterable[T]:
            return progress.track(items, description=text)

        found, sheets = measure(engine, teacher, probe, plan, watch)
    write_sheets(found, sheets, folder)
    write_plots(found, folder)
    told = Told(
        command=shlex.join(["stillstream", "eval", *wanted.words]),
        machine=f"{cpu_name()} (threads: {wanted.threads})",
        model=f"{engine.config.name} in `{wanted.model}`" if wanted.model else f"the embedded {engine.config.name}",
        teacher=f"`{wanted.teacher}`, guidance {teacher.guidance:g}" if teacher else "none at hand",
        probe=about,
        prompts=[ask.prompt for ask in asks.asks(asks.CLIPS_SEED, len(sheets.prompts))],
        camera_prompts=camera_prompts(engine),
        switches=[(each.before.prompt, each.after.prompt) for each in asks.switches(plan.switches)],
    )
    with replacing(wanted.out) as part:
        part.write_text(page(found, told, folder.name, kept_notes(wanted.out)), encoding="utf-8")
    table = Table("Measure", "must reach", "measured", "")
    for row in rows(found):
        table.add_row(row.measure, row.target, row.measured, row.reached)
    console.print(table)
    if doubtful(found):
        notes.print("The probe reads too little of real renders: give it a longer --probe-budget.")
    print(line(found), flush=True)


def prepare(out: Path) -> Path:
    """The folder for the page's pictures, beside it. What would fail at the end fails here, before anything is
    measured."""
    if find_spec("matplotlib") is None:
        raise AppError(
            "plots_missing", "matplotlib, which draws the plots, is not installed.", "pip install '.[train]'"
        )
    if out.suffix != ".md" or out.is_dir():
        raise AppError("out_unwritable", f"{out} is not a page in Markdown.", "Name a file that ends in .md.")
    folder, there = out.with_suffix(""), out.is_file()
    if folder.exists() and not folder.is_dir():
        raise AppError("out_unwritable", f"The pictures need a folder {folder}, which is a file.", "Name another page.")
    with replacing(out) as part:
        part.write_bytes(out.read_bytes() if there else b"")
    if not there:
        out.unlink()
    return folder


def ready_probe(wanted: Wanted, engine: Engine) -> tuple[Probe, str]:
    """The probe, and a sentence about where it came from."""
    if wanted.probe is not None:
        return read_probe(wanted.probe), f"It is `{wanted.probe}`."
    settings = StageSettings(budget_s=wanted.probe_budget_s, learning_rate=2e-3, ema=0.99)
    probe = train_probe(engine.config, wanted.probe_folder, settings)
    save_probe(probe, wanted.probe_folder / "probe.safetensors")
    saved = torch.load(wanted.probe_folder / "checkpoint.pt", weights_only=True)
    return probe, f"It was trained on renders for {saved['trained_s']:.0f} s, {saved['step']} steps."


def measure(
    engine: Engine, teacher: GuidedTeacher | None, probe: Probe, plan: Plan, watch: Watch
) -> tuple[Findings, Sheets]:
    config = engine.config
    asked = asks.asks(asks.CLIPS_SEED, plan.sheet)
    student = measured.at_steps(engine, 4)
    student.warm_up()
    sheet = measured.draw(student, probe, asked, watch=watch, text="4 steps", keep=min(NOISE_CLIPS, plan.clips))
    asked, drawn = asked[: plan.clips], first(sheet, plan.clips, probe)
    real = measured.renders(config, probe, asked)
    few = plan.steps_clips
    some, real_few = asked[:few], first(real, few, probe)
    models = [student if count == 4 else measured.at_steps(engine, count) for count in measured.STEP_COUNTS]
    scores = []
    for count, model in zip(measured.STEP_COUNTS, models, strict=True):
        made = first(sheet, few, probe)
        if model is not student:
            made = measured.draw(model, probe, some, watch=watch, text=f"steps: {count}")
        scores.append(measured.quality(made, real_few, some, config).score)
    taught = measured.draw(teacher, probe, asked, watch=watch, text="teacher") if teacher else None
    timed = [*models, teacher] if teacher else models
    times_ms = measured.time_chunks(timed, asked[0], perf_counter, rounds=plan.rounds, watch=watch)
    drift_asks = asks.asks(asks.DRIFT_SEED, plan.streams)
    render_clips = codec.render_clips(config, plan.codec_clips)
    generic_clips = codec.camera_clips(config, plan.codec_clips)
    kept = len(drawn.kept_THWC)
    found = Findings(
        clips=plan.clips,
        real=measured.quality(real, real, asked, config),
        floor=measured.floor(real, asked),
        bounds=bounds(probe, config, count=plan.probe_clips),
        student=measured.quality(drawn, real, asked, config),
        student_distance=measured.distance(drawn, real),
        teacher=measured.quality(taught, real, asked, config) if taught else None,
        teacher_distance=measured.distance(taught, real) if taught else None,
        teacher_ms=times_ms[-1] if teacher else None,
        steps=[StepsRow(*row) for row in zip(measured.STEP_COUNTS, scores, times_ms[: len(models)], strict=True)],
        drift=measured.measure_drift(student, probe, drift_asks, plan.drift_frames, watch=watch),
        switched=measured.measure_switches(student, probe, asks.switches(plan.switches), watch=watch),
        codec_psnr_renders=codec.codec_psnr_db(engine.codec, render_clips),
        codec_psnr_generic=codec.codec_psnr_db(engine.codec, generic_clips),
        streaming_gap=codec.streaming_gap(
            engine.codec, [*render_clips[:2], *generic_clips[:2]], config.frames_per_chunk
        ),
        noises=codec.background_noises(
            engine.codec, config, asked[:kept], drawn.kept_THWC, drawn.answers.centres_BT2[:kept]
        ),
    )
    prompts = [measured.pictures(clip)[::2] for clip in sheet.clips_BTCHW[:SHEET_PROMPTS]]
    return found, Sheets(prompts, camera_rows(student, watch))


def first(drawn: Drawn, count: int, probe: Probe) -> Drawn:
    clips = drawn.clips_BTCHW[:count]
    return Drawn(clips, probe.read(clips), drawn.kept_THWC[:count])


def camera_prompts(engine: Engine) -> list[str]:
    given = engine.config.examples or ("",)
    return [given[number % len(given)] for number in range(CAMERA_CLIPS)]


def camera_rows(student: Engine, watch: Watch) -> list[list[Pictures]]:
    """The camera, and what comes of it at each strength and structure: three pictures each."""
    clips = codec.camera_clips(student.config, CAMERA_CLIPS, CAMERA_CHUNKS)
    pairs = list(zip(clips, camera_prompts(student), strict=True))
    found = []
    for clip, prompt in watch(pairs, "camera"):
        shown = [clip, *(measured.follow_camera(student, prompt, clip, *how) for how in FOLLOWED)]
        found.append([picture for each in shown for picture in shrink(each[[0, len(each) // 2, -1]])])
    return found


def write_sheets(found: Findings, sheets: Sheets, folder: Path) -> None:
    """Raises AppError (`out_unwritable`)."""
    prompts = list(sheets.prompts)
    if len(prompts) % 2:
        prompts.append([np.full_like(picture, 255) for picture in prompts[-1]])
    pairs = [left + right for left, right in zip(prompts[::2], prompts[1::2], strict=True)]
    each = {
        "prompts": pairs,
        "camera": sheets.camera,
        "drift-strips": found.drift.strips,
        "switches": found.switched.strips,
    }
    try:
        for name, strips in each.items():
            write_sheet(folder / f"{name}.jpg", strips)
    except OSError as error:
        raise AppError(
            "out_unwritable",
            f"The pictures cannot be written to {folder}.",
            "Name a page in a folder you may write to.",
        ) from error
