"""The `stillstream` command; the only reader of argv and environment.

Every error that a person can act on is one line and exit code 2; Ctrl-C ends any command quietly.
"""

import logging
import os
import signal
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from typer.exceptions import TyperException

from app.cli_models import AcceptLicence, Bits, Folders, Like, TextBits, TextDevice, models, named, told_licence
from app.config import Settings
from app.errors import SPOKEN, AppError, memory_short
from app.worker import LoadEngine, calm_openmp, default_threads, eager_openmp
from pipeline.chunk import Controls
from pipeline.config import WanModel

USAGE_ERROR = 2
INTERRUPTED = 130

app = typer.Typer(name="stillstream", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.add_typer(models)
out = Console()
err = Console(stderr=True)

Model = Annotated[Path | None, typer.Option(help="A folder, or a name of `models list`; by default pocket.")]
Size = Annotated[str | None, typer.Option(help="Of the picture, for models that know many sizes; 832x480.")]
Lora = Annotated[
    list[Path] | None, typer.Option(help="Low-rank weights to wear, a file; may be repeated, the first is worn.")
]
LoraStrength = Annotated[float | None, typer.Option(min=0, max=4, help="How strongly; 1 is as they were trained.")]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads for generation; by default chosen by the cores.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        out.print(f"stillstream {version('stillstream')}", highlight=False)
        raise typer.Exit


@app.callback()
def stillstream(
    wanted: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True)] = False,
) -> None:
    """Live generative video: from a prompt or a webcam, in a browser or into a file."""


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="The address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="The port; 0 takes any free one.")] = None,
    model: Model = None,
    like: Like = None,
    size: Size = None,
    decoder: Annotated[str | None, typer.Option(help="Codec of a Wan model: tiny (quick), or full.")] = None,
    bits: Bits = None,
    text_bits: TextBits = None,
    text_device: TextDevice = None,
    lora: Lora = None,
    lora_strength: LoraStrength = None,
    device: Annotated[str | None, typer.Option(help="Where to compute: cpu, cuda, cuda:1.")] = None,
    threads: Threads = None,
    workers: Annotated[int | None, typer.Option(help="Worker processes; each serves one viewer.")] = None,
    accept_licence: AcceptLicence = False,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
) -> None:
    """Serve the live page. Each option can also be set as STILLSTREAM_<OPTION>."""
    settings = _settings(
        host=host,
        port=port,
        model=model,
        like=like,
        size=size,
        decoder=decoder,
        bits=bits,
        text_bits=text_bits,
        text_device=text_device,
        lora=None if lora is None else tuple(lora),
        lora_strength=lora_strength,
        device=device,
        threads=threads,
        workers=workers,
        accept_licence=accept_licence or None,
        log_level=log_level,
    )
    chosen = named(
        settings.model,
        settings.device,
        like=settings.like,
        size=settings.size,
        decoder=settings.decoder,
        bits=settings.bits,
        text_bits=settings.text_bits,
        text_device=settings.text_device,
        accept_licence=settings.accept_licence,
        loras=settings.lora,
        workers=settings.workers,
        folders=_folders(),
    )
    _tell_licence(chosen)
    factory = LoadEngine(chosen, settings.device, settings.chosen_threads, settings.lora, settings.lora_strength)
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("aioice").setLevel(logging.WARNING)
    from app.serve import serve as run

    run(
        settings,
        factory,
        lambda url: out.print(f"Stillstream is on [link={url}]{url}[/link]  (Ctrl-C ends it)", highlight=False),
    )


@app.command()
def generate(
    prompt: Annotated[str, typer.Option(help="What should be seen.")],
    out_path: Annotated[Path, typer.Option("--out", help="The clip to write: .mp4, .webm or .webp.")] = Path(
        "clip.mp4"
    ),
    seconds: Annotated[
        float | None, typer.Option(min=0.05, max=3600, help="5 unless told otherwise; with --input, all of the video.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="The same seed makes the same clip.")] = 7,
    clip: Annotated[Path | None, typer.Option("--input", help="A video to follow.")] = None,
    strength: Annotated[float, typer.Option(min=0, max=1, help="How far it may leave the video.")] = 0.6,
    structure: Annotated[float, typer.Option(min=0, max=1, help="How closely it keeps to the video's outlines.")] = 0.0,
    motion_aware: Annotated[
        bool | None,
        typer.Option(help="Keep closer to the video where it moves fast; by default as the model has it."),
    ] = None,
    regions: Annotated[
        float, typer.Option(min=0, max=1, help="Compute only what moves: 0 is off, then from quality to speed.")
    ] = 0.0,
    show_tiles: Annotated[bool, typer.Option("--show-tiles", help="With --regions: tint the computed tiles.")] = False,
    image: Annotated[Path | None, typer.Option(help="A picture to begin with.")] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, max=200, help="Denoise passes of a chunk; by default the model's own.")
    ] = None,
    step_cache: Annotated[
        float,
        typer.Option(min=0, max=10, help="With 8 steps and more: leave out passes that change less; 0 runs each."),
    ] = 0.0,
    latents: Annotated[Path | None, typer.Option(help="Also keep the latents, as .safetensors.")] = None,
    model: Model = None,
    like: Like = None,
    size: Size = None,
    decoder: Annotated[str, typer.Option(help="Codec of a Wan model: full (exact), or tiny.")] = "full",
    bits: Bits = None,
    text_bits: TextBits = None,
    text_device: TextDevice = None,
    lora: Lora = None,
    lora_strength: LoraStrength = None,
    device: Device = "cpu",
    threads: Threads = None,
    accept_licence: AcceptLicence = False,
) -> None:
    """Write a clip from a prompt, and a picture to begin with or a video to follow."""
    if show_tiles and not regions:
        raise AppError("setting_invalid", "Without --regions every tile is computed.", "Add --regions to --show-tiles.")
    chosen, loras = threads or default_threads(), tuple(lora or ())
    calm_openmp(chosen)
    from app.generate import generate as run

    drawn_by = named(
        model,
        device,
        like=like,
        size=size,
        decoder=decoder,
        bits=bits or 16,
        text_bits=text_bits or 16,
        text_device=text_device or "auto",
        accept_licence=accept_licence,
        loras=loras,
        folders=_folders(),
    )
    _tell_licence(drawn_by)
    _tell_steps(drawn_by, steps)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err) as progress:
        bar = progress.add_task("frames", total=None, rate="")

        def started(frames: int | None) -> None:
            progress.reset(bar, total=frames)

        def made(frames: int) -> None:
            progress.advance(bar, frames)
            speed = progress.tasks[0].speed
            progress.update(bar, rate=f"{speed:.1f} fps" if speed else "")

        written = run(
            LoadEngine(drawn_by, device, chosen, loras, steps=steps, step_cache=step_cache),
            Controls(
                prompt,
                seed,
                strength,
                structure,
                regions,
                lora=loras[0].stem if loras else "",
                lora_strength=1.0 if lora_strength is None else lora_strength,
                motion_aware=motion_aware,
            ),
            seconds,
            out_path,
            clip=clip,
            image=image,
            latents=latents,
            show_tiles=show_tiles,
            on_start=started,
            on_chunk=made,
        )
    out.print(f"Wrote {out_path}", highlight=False)
    if written.regions:
        err.print(written.regions, highlight=False, soft_wrap=True)
    if written.unknown_words:
        err.print(f"This model does not know: {', '.join(written.unknown_words)}.", highlight=False)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)
def bench(context: typer.Context) -> None:
    """Measure this machine: stages, rates, latency, and the same under load."""
    calm_openmp(default_threads())
    from app.bench import main as run

    raise typer.Exit(run(context.args) or 0)


@app.command()
def train(
    out_path: Annotated[
        Path | None, typer.Option("--out", help="Where all of it goes; runs/pocket or runs/wan without it.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A TOML file: what differs from the pocket student.")] = None,
    budget: Annotated[str | None, typer.Option(help="Time of training in all, as 90s, 20m or 1.5h.")] = None,
    stage: Annotated[str | None, typer.Option(help="Stop after this stage of the recipe.")] = None,
    threads: Threads = None,
    device: Device = "cpu",
) -> None:
    """Train the pocket student on the procedural world, or what --config names. Resumes where it was stopped.

    A file that says recipe = "wan" trains a Wan model on encoded clips: torchrun --nproc-per-node 2 -m app train ...
    """
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun says so: processes that share this machine
    chosen = threads or max(1, default_threads() // beside)
    (eager_openmp if beside == 1 else calm_openmp)(chosen)
    from pipeline.training.recipe import run, scaled
    from pipeline.training.settings import WanSettings, load_settings, read_budget
    from pipeline.training.wan import run_wan

    settings = load_settings(config) if config else None
    budget_s = read_budget(budget) if budget else None
    if isinstance(settings, WanSettings):
        whole = scaled(settings, budget_s)
        run_wan(out_path or Path("runs/wan"), whole, stage=stage, threads=chosen, device=device)
        if beside > 1:
            # All is saved. Threads that torch.distributed leaves behind were seen to abort a process as it was taken
            # apart, which torchrun would report as a failed run.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
    else:
        run(out_path or Path("runs/pocket"), settings, budget_s=budget_s, stage=stage, threads=chosen, device=device)


@app.command()
def encode(
    clips: Annotated[Path, typer.Argument(help="The folder with your clips and their captions.")],
    model: Annotated[Path, typer.Option(help="A Wan folder in diffusers' layout: vae, text_encoder, tokenizer.")],
    out_path: Annotated[Path, typer.Option("--out", help="The folder to write to; a second run goes on.")],
    width: Annotated[int, typer.Option(min=16, help="Of the pictures, a multiple of 16.")] = 832,
    height: Annotated[int, typer.Option(min=16, help="Of the pictures, a multiple of 16.")] = 480,
    fps: Annotated[int, typer.Option(min=1, help="Pictures a second.")] = 16,
    latents: Annotated[int, typer.Option(min=1, help="Latent frames of a clip: whole chunks of the model.")] = 21,
    places: Annotated[int, typer.Option(min=1, help="Tokens at which a caption is cut.")] = 512,
    threads: Threads = None,
    device: Device = "cpu",
) -> None:
    """Encode your own clips for the training of a Wan model: latents and prompt embeddings, once, on disk."""
    for name, size in (("width", width), ("height", height)):
        if size % 16:
            raise AppError("setting_invalid", f"The {name} {size} is no multiple of 16.", f"Correct --{name}.")
    chosen = threads or default_threads()
    calm_openmp(chosen)
    import torch

    from pipeline.training.encode import Shape
    from pipeline.training.encode import encode as run
    from pipeline.training.wan_text import load_embed
    from pipeline.wan_codec import load_wan_codec

    torch.set_num_threads(chosen)
    shape = Shape(width, height, fps, latents, f"{model.absolute().name}, {places} places")
    codec = load_wan_codec(model / "vae").to(device)
    made = run(clips, out_path, shape, codec, load_embed(model, places=places, device=device), device=device)
    out.print(escape(made.told()), highlight=False)


@app.command(name="eval")
def evaluate(
    model: Model = None,
    teacher: Annotated[
        Path | None,
        typer.Option(help="The teacher's folder, of the run that made the model; by default `teacher` beside it."),
    ] = None,
    probe: Annotated[
        Path | None, typer.Option(help="A probe's .safetensors; by default the one that comes with Stillstream.")
    ] = None,
    probe_budget: Annotated[
        str | None, typer.Option(help="Train a probe in runs/pocket/probe for this long, as 90s or 20m.")
    ] = None,
    clips: Annotated[int | None, typer.Option(min=4, help="Clips that the figures are read from.")] = None,
    drift_frames: Annotated[int | None, typer.Option(min=0, help="The latest frame that drift is read at.")] = None,
    streams: Annotated[
        int | None, typer.Option(min=1, help="Streams that drift is read from; two go beyond frame 4000.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A rough look in a minute or two.")] = False,
    out_path: Annotated[Path, typer.Option("--out", help="The page to write; its pictures go beside it.")] = Path(
        "docs/student.md"
    ),
    threads: Threads = None,
) -> None:
    """Measure how well a model draws what it is asked for, and write a page with what was found.

    A quarter of an hour on two cores.
    """
    chosen = threads or default_threads()
    calm_openmp(chosen)
    from app.evaluate import QUICK, Plan, Wanted
    from app.evaluate import evaluate as run
    from pipeline.training.settings import read_budget

    chosen_model = named(model, "cpu", folders=_folders())
    if isinstance(chosen_model, WanModel):
        raise AppError(
            "setting_invalid", "What is measured is the pocket's world.", "Name a folder of your own training."
        )
    model = chosen_model
    beside = model.absolute().parent / "teacher" if model else None
    if teacher is None and beside is not None and (beside / "checkpoint.pt").is_file():
        teacher = beside
    changes: dict[str, Any] = {"clips": clips, "drift_frames": drift_frames, "streams": streams}
    plan = replace(QUICK if quick else Plan(), **{name: value for name, value in changes.items() if value is not None})
    wanted = Wanted(
        model=model,
        teacher=teacher,
        probe=probe,
        probe_folder=Path("runs/pocket/probe"),
        probe_budget_s=read_budget(probe_budget) if probe_budget else None,
        out=out_path,
        threads=chosen,
        words=sys.argv[2:],
    )
    run(wanted, plan)


@app.command()
def doctor(
    host: Annotated[str, typer.Option()] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    model: Model = None,
    like: Like = None,
) -> None:
    """Tell what this machine can do and what is missing."""
    calm_openmp(default_threads())
    from app.doctor import MISSING, examine

    colours = {"ok": "green", "warn": "yellow", "missing": "red"}
    missing = 0
    table = Table.grid(padding=(0, 2))
    for finding in examine(lambda: named(model, "cpu", like=like, folders=_folders()), host, port):
        missing += finding.level == MISSING
        colour = colours[finding.level]
        remedy = f" {finding.remedy}" if finding.remedy else ""
        table.add_row(f"[{colour}]{finding.level}[/]", finding.what, f"{finding.fact}.{remedy}")
    out.print(table, highlight=False)
    if missing:
        raise typer.Exit(1)


def _folders() -> Folders:
    """Where models lie, as far as the environment says."""
    hub, models = (os.environ.get(name) for name in ("HF_HUB_CACHE", "STILLSTREAM_MODELS"))
    return Path(hub) if hub else None, Path(models) if models else None


def _tell_licence(model: Path | WanModel | None) -> None:
    """On standard error: what a program reads on standard output stays as it was."""
    if told := told_licence(model):
        err.print(escape(told), highlight=False, soft_wrap=True)


def _tell_steps(model: Path | WanModel | None, steps: int | None) -> None:
    """A file may be drawn in more passes than the model was made for, to compare: that is told and not refused."""
    from pipeline.checks import untrained
    from pipeline.weights import config_of

    if steps is not None and (told := untrained(config_of(model), steps)):
        err.print(escape(f"{told} Drawn in {steps} all the same."), highlight=False, soft_wrap=True)


def _settings(**flags: Any) -> Settings:
    try:
        return Settings(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else "settings"
        raise AppError(
            "setting_invalid",
            f"The setting {name} is wrong: {first['msg'].lower()}, not {first['input']!r}.",
            f"Correct --{name.replace('_', '-')} or STILLSTREAM_{name.upper()}.",
        ) from error


def _end(number: int, _: object) -> None:
    """Ended by a signal like any other end: half-written files are cleared away."""
    sys.exit(128 + number)


def main() -> None:
    signal.signal(signal.SIGTERM, _end)
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except TyperException as error:
        if len(sys.argv) == 1:  # no command at all: the help is the answer, and it has been printed
            sys.exit(USAGE_ERROR)
        context = getattr(error, "ctx", None)
        where = f"{context.command_path if context else 'stillstream'} --help"
        said = escape(f"{error.format_message().rstrip('.')}. `{where}` lists what can be said.")
        err.print(f"[red]setting_invalid[/]: {said}", highlight=False, soft_wrap=True)
        sys.exit(USAGE_ERROR)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except typer.Abort:  # Ctrl-C or the end of the input, at a question
        err.print("Stopped; the question was not answered.")
        sys.exit(INTERRUPTED)
    except Exception as error:
        if spoken := error if isinstance(error, SPOKEN) else memory_short(error):
            said = escape(f"{spoken.message} {spoken.remedy}")
            err.print(f"[red]{spoken.code}[/]: {said}", highlight=False, soft_wrap=True)
            sys.exit(USAGE_ERROR)
        if os.environ.get("STILLSTREAM_LOG_LEVEL") == "debug":
            raise
        what = f"Something went wrong inside: {type(error).__name__}: {error}."
        err.print(f"[red]internal_error[/]: {escape(what)} STILLSTREAM_LOG_LEVEL=debug shows where.", soft_wrap=True)
        sys.exit(1)
