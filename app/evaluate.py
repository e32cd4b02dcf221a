"""`stillstream eval`: measures a model, writes a page with tables, plots and sheets, prints one line of JSON last.

Owns the clock, the files and the progress; what is measured, and how, is the business of `pipeline.training.evaluate`.
A target that is missed is told and is no error.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from app.bench_engine import cpu_name
from app.clip import replacing
from app.errors import AppError
from app.evaluate_figures import Findings, doubtful, line, rows
from app.evaluate_plots import write_plots
from app.evaluate_report import Told, kept_notes, page
from app.probe import read_probe
from app.spread import Spreader
from pipeline.codec import PocketCodec, multiplies_bfloat16
from pipeline.engine import Engine
from pipeline.training import asks
from pipeline.training import evaluate as measured
from pipeline.training import evaluate_codec as codec
from pipeline.training import evaluate_streams as streams
from pipeline.training.evaluate import Drawn, Made, Pictures, Spread, StepsRow
from pipeline.training.guided import GuidedTeacher, load_teacher
from pipeline.training.probe import EMBEDDED, Probe, bounds, load_probe, save_probe, told_of, train_probe
from pipeline.training.probe_clips import shrink
from pipeline.training.settings import StageSettings
from pipeline.training.sheet import write_sheet
from pipeline.weights import load_parts, pocket_folder

PROBE_BUDGET_S = 900.0
SHEET_PROMPTS, CAMERA_CLIPS, CAMERA_CHUNKS = 24, 5, 4
NOISE_CLIPS = 24  # kept at their full size, 6 MB each
MANY_UNTIL = 4000  # the frame at which three points are judged; later only a collapse is
FOLLOWED = ((0.3, 0.0), (0.6, 0.0), (0.9, 1.0))  # strength, structure


@dataclass(frozen=True)
class Plan:
    """How much is measured. The whole takes a quarter of an hour on two cores, half of it the long streams.

    drift_frames: the latest frame at which drift is read, of `long_streams`; the others end at frame 4000.
    """

    clips: int = 48
    drift_frames: int = 20000
    streams: int = 12
    long_streams: int = 2
    probe_clips: int = 256
    codec_clips: int = 24
    rounds: int = 5
    quick: bool = False

    @property
    def switches(self) -> int:
        return max(2, self.clips // 2)

    @property
    def sheet(self) -> int:
        """Prompts drawn for the contact sheet; the clips that are measured come first."""
        return self.clips if self.quick else max(SHEET_PROMPTS, self.clips)

    @property
    def untils(self) -> list[int]:
        """The latest frame of each long stream."""
        return [
            self.drift_frames if number < self.long_streams else min(self.drift_frames, MANY_UNTIL)
            for number in range(self.streams)
        ]


QUICK = Plan(clips=6, drift_frames=256, streams=2, probe_clips=32, codec_clips=4, rounds=3, quick=True)


@dataclass(frozen=True)
class Wanted:
    """What to measure and where to write. teacher None: its rows are not measured. probe None: the embedded one; given
    a budget, or where none is embedded, one that is trained in `probe_folder`; what was spent before counts."""

    model: Path | None
    teacher: Path | None
    probe: Path | None
    probe_folder: Path
    probe_budget_s: float | None
    out: Path
    threads: int
    words: Sequence[str] = ()


@dataclass(frozen=True)
class Sheets:
    prompts: list[list[Pictures]]
    camera: list[list[Pictures]]


def evaluate(wanted: Wanted, plan: Plan) -> None:
    """Raises AppError (`out_unwritable`, `plots_missing`, `probe_unreadable`) and what loading a model raises."""
    folder, began_s = prepare(wanted.out), perf_counter()
    console, notes = Console(), Console(stderr=True)
    engine = Engine.load(wanted.model, threads=wanted.threads)
    teacher = load_teacher(wanted.teacher, engine) if wanted.teacher else None
    _, exact, _, _ = load_parts(wanted.model or pocket_folder())
    probe, about = ready_probe(wanted, engine)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=notes) as progress:
        found, sheets = measure(engine, exact, teacher, probe, plan, Spreader(progress, wanted.threads))
    write_sheets(found, sheets, folder)
    write_plots(found, folder)
    told = Told(
        command=shlex.join(["stillstream", "eval", *wanted.words]),
        machine=f"{cpu_name()} (threads: {wanted.threads})",
        model=(f"{engine.config.name} in `{wanted.model}`" if wanted.model else f"the embedded {engine.config.name}")
        + f", its codec in {'bfloat16' if multiplies_bfloat16() else 'single precision'}",
        teacher=f"`{wanted.teacher}`, guidance {teacher.guidance:g}" if teacher else "none at hand",
        probe=about,
        took_s=perf_counter() - began_s,
        plan=counts(plan),
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
    if wanted.probe_budget_s is None and EMBEDDED.is_file():
        return load_probe(EMBEDDED), f"It is the embedded one, {told_of(EMBEDDED)}."
    settings = StageSettings(budget_s=wanted.probe_budget_s or PROBE_BUDGET_S, learning_rate=2e-3, ema=0.99)
    probe = train_probe(engine.config, wanted.probe_folder, settings)
    saved = torch.load(wanted.probe_folder / "checkpoint.pt", weights_only=True)
    about = f"trained on renders for {saved['trained_s']:.0f} s, {saved['step']} steps"
    save_probe(probe, wanted.probe_folder / "probe.safetensors", about)
    return probe, f"It was {about}."


def counts(plan: Plan) -> str:
    """How much was measured, for the page."""
    ends = ", ".join(f"{plan.untils.count(until)} to frame {until}" for until in sorted(set(plan.untils)))
    return (
        f"{plan.clips} clips a row, {plan.streams} long streams ({ends}), {plan.switches} prompt switches, "
        f"{plan.codec_clips} clips of each kind through the autoencoder, and {plan.probe_clips} held-out renders for "
        "the probe"
    )


def measure(
    engine: Engine, exact: PocketCodec, teacher: GuidedTeacher | None, probe: Probe, plan: Plan, spread: Spread
) -> tuple[Findings, Sheets]:
    """exact: the engine's codec in single precision; in its own, sums in another order may round to another number."""
    config, pictures = engine.config, engine.codec
    assert isinstance(pictures, PocketCodec), "what is measured is a pocket student"
    models = {count: measured.at_steps(engine, count) for count in measured.STEP_COUNTS}
    student, asked = models[4], asks.asks(asks.CLIPS_SEED, plan.sheet)
    student.warm_up()
    sheet = measured.draw(student, probe, asked, spread=spread, text="4 steps", keep=min(NOISE_CLIPS, plan.clips))
    asked, drawn = asked[: plan.clips], first(sheet, plan.clips, probe)
    real = measured.renders(config, probe, asked)
    # The row of 50 steps is the teacher: what a few steps stand in for.
    times_ms = measured.time_chunks(
        [*models.values(), *([teacher] if teacher else [])], asked[0], perf_counter, rounds=plan.rounds, spread=spread
    )
    ms = dict(zip(models, times_ms, strict=False))
    unguided_ms, ms[50] = ms[50], times_ms[-1]
    made = {4: drawn}
    for count in (1, 2, 8, 50):
        model = teacher if teacher and count == 50 else models[count]
        made[count] = measured.draw(model, probe, asked, spread=spread, text=f"steps: {count}")
    found = {count: measured.quality(clips, real, asked, config) for count, clips in made.items()}
    drift_asks = asks.asks(asks.DRIFT_SEED, plan.streams)
    drifting = streams.glanced(student, plan.drift_frames)
    render_clips = codec.render_clips(config, plan.codec_clips)
    generic_clips = codec.camera_clips(config, plan.codec_clips)
    kept = len(drawn.kept_THWC)
    findings = Findings(
        clips=plan.clips,
        real=measured.quality(real, real, asked, config),
        floor=measured.floor(real, asked),
        bounds=bounds(probe, config, count=plan.probe_clips),
        student=found[4],
        student_distance=measured.distance(drawn, real),
        teacher=found[50] if teacher else None,
        teacher_distance=measured.distance(made[50], real) if teacher else None,
        unguided_ms=unguided_ms,
        steps=[StepsRow(count, found[count].score, ms[count]) for count in measured.STEP_COUNTS],
        drift=streams.measure_drift(drifting, probe, drift_asks, plan.untils, spread=spread),
        switched=streams.measure_switches(student, probe, asks.switches(plan.switches), spread=spread),
        codec_psnr_renders=codec.codec_psnr_db(pictures, render_clips),
        codec_psnr_generic=codec.codec_psnr_db(pictures, generic_clips),
        streaming_gap=codec.streaming_gap(exact, [*render_clips[:2], *generic_clips[:2]], config.frames_per_chunk),
        noises=codec.background_noises(
            pictures, config, asked[:kept], drawn.kept_THWC, drawn.answers.centres_BT2[:kept]
        ),
    )
    prompts = [measured.pictures(clip)[::2] for clip in sheet.clips_BTCHW[:SHEET_PROMPTS]]
    return findings, Sheets(prompts, camera_rows(student, spread))


def first(drawn: Drawn, count: int, probe: Probe) -> Drawn:
    clips = drawn.clips_BTCHW[:count]
    return Drawn(clips, probe.read(clips), drawn.kept_THWC[:count])


def camera_prompts(engine: Engine) -> list[str]:
    given = engine.config.examples or ("",)
    return [given[number % len(given)] for number in range(CAMERA_CLIPS)]


def camera_rows(student: Engine, spread: Spread) -> list[list[Pictures]]:
    """The camera, and what comes of it at each strength and structure: three pictures each."""
    clips = codec.camera_clips(student.config, CAMERA_CLIPS, CAMERA_CHUNKS)

    def row(pair: tuple[Pictures, str], made: Made) -> list[Pictures]:
        clip, prompt = pair
        shown = [clip]
        for how in FOLLOWED:
            shown.append(measured.follow_camera(student, prompt, clip, *how))
            made()
        return [picture for each in shown for picture in shrink(each[[0, len(each) // 2, -1]])]

    pairs = list(zip(clips, camera_prompts(student), strict=True))
    return spread(row, pairs, len(pairs) * len(FOLLOWED), "camera")


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
