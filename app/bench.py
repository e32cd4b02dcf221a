"""`stillstream bench`: measures this machine part by part. Tables for people, one line of JSON last.

The engine alone, the live path with a viewer, and the same while other programs want every core. Figures are held
against their targets and told either way: a slow machine is no error.
"""

import asyncio
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from app import bench_figures as figures
from app.bench_engine import count_operations, describe_machine, floors, measure_engine
from app.bench_figures import LOADED, Report
from app.bench_live import measure_live
from app.bench_regions import label, measure_regions
from app.bench_viewer import Plan
from app.errors import AppError
from app.region_speed import Row
from app.worker import LoadEngine, default_threads

SESSIONS = 10
PROMPT_CHANGES = 20
QUICK_S = 10.0

# Tables of `--regions`: figures by their keys, under a shorter name.
REGIONS = {
    "Time and mask": {
        "active_fraction": "tiles",
        "speedup": "speedup",
        "cpu_speedup": "cpu",
        "mask_recall": "recall",
        "mask_precision": "precision",
    },
    "Likeness where it moves": {
        "psnr_active": "psnr",
        "ssim_active": "ssim",
        "gmsd_active": "gmsd",
        "lpips_active": "lpips",
        "flow_ratio": "flow",
    },
    "Held, and in between": {
        "static_error_ratio": "static error",
        "seam": "seam",
        "pop": "pop",
        "ghost": "ghost",
        "encoded_bytes_ratio": "bytes",
    },
    "Free runs, and standard errors": {
        "motion_gap": "motion",
        "motion_gap_error": "+-",
        "probe_gap": "probe",
        "probe_gap_error": "+-",
        "fd_ratio": "fd",
        "fd_ratio_error": "+-",
    },
}

command = typer.Typer(add_completion=False)


def main(words: list[str]) -> int:
    """words: what follows `stillstream bench`. Wrong ones are told by the command that this one is a part of."""
    return int(command(args=words, prog_name="stillstream bench", standalone_mode=False) or 0)


@command.command()
def bench(
    seconds: Annotated[float, typer.Option(min=0.1, help="Length of each calm part.")] = 30.0,
    live: Annotated[bool, typer.Option(help="Also with a server and a viewer.")] = True,
    loaded: Annotated[bool, typer.Option(help="Also with every core busy.")] = True,
    out: Annotated[Path | None, typer.Option(help="Write the JSON here too.")] = None,
    model: Annotated[Path | None, typer.Option(help="A model folder; without it, the pocket student.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="By default chosen by the cores.")] = None,
    regions: Annotated[bool, typer.Option("--regions", help="Region caching instead: dense beside sparse.")] = False,
    dial: Annotated[float, typer.Option(min=0.01, max=1, help="With --regions: from quality to speed.")] = 0.5,
    chunks: Annotated[int, typer.Option(min=4, help="With --regions: chunks of each scenario.")] = 16,
    probe: Annotated[
        Path | None, typer.Option(help="With --regions: a probe's .safetensors; by default the one that comes along.")
    ] = None,
    free: Annotated[
        int, typer.Option(min=0, help="With --regions: streams of 250 chunks, dense and sparse, in each mode.")
    ] = 2,
    scenario: Annotated[list[str] | None, typer.Option(help="With --regions: only these.")] = None,
) -> None:
    """Measure this machine: stages, rates, latency, and the same under load."""
    if out is not None and not out.absolute().parent.is_dir():
        raise AppError("out_unwritable", f"There is no folder {out.absolute().parent}.", "Make it first.")
    console, notes = Console(), Console(stderr=True)
    chosen = threads or default_threads()
    if regions:
        with notes.status("Dense beside sparse"):
            rows = measure_regions(model, chosen, dial, chunks, scenario or [], probe, free)
        for table in regions_tables(rows):
            console.print(table)
        text = json.dumps({"threads": chosen, "dial": dial, "chunks": chunks, "free": free, "regions": rows})
        if out is not None:
            out.write_text(text + "\n")
        print(text, flush=True)
        return
    measured: Report = {}
    plan = plan_for(seconds)
    with notes.status("The engine alone") as status:
        measured |= measure_alone(model, chosen, seconds)
        if live:
            status.update("The live path: a server and a viewer")
            measured |= measure_live(model, chosen, plan, loaded=False)
        if live and loaded:
            status.update("The live path while every core is busy")
            try:
                under_load = measure_live(model, chosen, plan, loaded=True)
            except AppError as error:  # too slow to measure, which takes nothing from the other parts
                notes.print(f"No figures with every core busy: {error.message}", highlight=False)
            else:
                measured |= {LOADED + key: value for key, value in under_load.items()}
    report = figures.finish(measured)
    for table in tables(report):
        console.print(table)
    text = figures.line(report)
    if out is not None:
        out.write_text(text + "\n")
    print(text, flush=True)


def plan_for(seconds: float) -> Plan:
    """A short run asks for fewer sessions and changes as well."""
    few = seconds < QUICK_S
    return Plan(2 if few else SESSIONS, seconds, 2 if few else PROMPT_CHANGES)


def measure_alone(model: Path | None, threads: int, seconds: float) -> Report:
    """Machine, stages and floor. The worker is gone before this process computes anything itself."""
    factory = LoadEngine(model, "cpu", threads)
    config, measured = asyncio.run(measure_engine(factory, threads, seconds))
    machine = describe_machine(config, threads)
    rate, codec_rate = (float(machine[name] or 0) for name in ("matmul_gflops", "matmul_codec_gflops"))
    return machine | measured | floors(count_operations(factory), rate, max(rate, codec_rate))


def tables(report: Report) -> list[Table]:
    machine = Table("Machine", "")
    for key in figures.MACHINE:
        value = report[key]
        machine.add_row(key.replace("_", " "), f"{value:.0f}" if isinstance(value, float) else str(value))
    stages = Table("Stage", *(_right(name) for name in ("p50 ms", "p95 ms", "floor ms", "GFLOP")))
    for row in figures.stage_rows(report):
        stages.add_row(*row)
    engine = Table("Engine alone", *(_right(name) for name in ("", "target")), "")
    for row in figures.engine_rows(report):
        engine.add_row(*row)
    if report["fps_viewer"] is None:
        return [machine, stages, engine]
    live = Table("Live, one viewer", *(_right(name) for name in ("", "cores busy", "target")), "")
    for row in figures.live_rows(report):
        live.add_row(*row)
    return [machine, stages, engine, live]


def regions_tables(rows: list[Row]) -> list[Table]:
    """All that was measured, as tables that 80 columns hold; what no row has is left out."""
    made = []
    for title, names in REGIONS.items():
        told = [key for key in names if any(row[key] is not None for row in rows)]
        table = Table(Column(title, no_wrap=True, max_width=28), *(_right(names[key]) for key in told))
        for row in rows:
            if any(row[key] is not None for key in told):
                values = ("" if row[key] is None else f"{row[key]:.2f}" for key in told)
                table.add_row(label(row), *values)
        if told:
            made.append(table)
    return made


def _right(name: str) -> Column:
    return Column(name, justify="right")
