"""Tables and plots from results of `stillstream bench --regions --out`: speed against the share of tiles, and quality.

    .venv/bin/python benchmarks/regions.py docs one.json two.json
    .venv/bin/python benchmarks/regions.py docs one.json --strips

Measures nothing; with --strips the pocket student also draws dense chunks beside sparse ones.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from matplotlib import pyplot

from app.bench_regions import FREE, READ, SPEED, TOLD, label
from app.region_speed import cost_model
from app.region_strips import draw_strips
from pipeline.engine import Engine

Row = dict[str, Any]

TIMES = (
    *("active_fraction", "dense_ms", "sparse_ms", "speedup", "cpu_speedup"),
    *("mask_recall", "mask_precision", "encoded_bytes_ratio"),
)
LIKENESS = tuple(name for name in TOLD if name not in TIMES)
# What is plotted of each scenario, and the lines that it must stay at the right side of, or between.
PANELS: dict[str, tuple[float, ...]] = {
    "psnr_active": (27.0,),
    "ssim_active": (0.93,),
    "static_error_ratio": (1.2,),
    "seam": (1.15,),
    "pop": (1.3,),
    "flow_ratio": (0.9, 1.1),
    "ghost": (),
    "mask_recall": (0.97, 0.99),
    "mask_precision": (0.5,),
    "encoded_bytes_ratio": (),
}
COLUMNS = 5


def table(rows: list[Row], names: tuple[str, ...]) -> str:
    """Figures by row, without those that no row has."""
    told = [name for name in names if any(row.get(name) is not None for row in rows)]
    lines = [_row("scenario", *(name.replace("_", " ") for name in told)), _row("---", *("---:" for _ in told))]
    for row in rows:
        lines.append(_row(label(row), *(_cell(name, row.get(name)) for name in told)))
    return "\n".join(lines)


def models(rows: list[Row]) -> dict[str, tuple[float, float]]:
    """The cost model of each size and mode, fitted where something is held."""
    made = {}
    for name in dict.fromkeys(label(row) for row in rows):
        of = [row for row in rows if label(row) == name and row["active_fraction"] < 1]
        if len(of) > 1:
            made[name] = cost_model([row["active_fraction"] for row in of], [1 / row["cpu_speedup"] for row in of])
    return made


def plot(rows: list[Row], path: Path) -> None:
    """Speed-up against the share of tiles: measured, by the cost model, and if all work were shared out by tiles."""
    sizes, shares = list(dict.fromkeys(row["size"] for row in rows)), np.linspace(0.04, 1, 97)
    figure, panels = pyplot.subplots(1, len(sizes), figsize=(5.5 * len(sizes), 4), squeeze=False)
    for axes, size in zip(panels[0], sizes, strict=True):
        own = [row for row in rows if row["size"] == size]
        fitted = models(own)
        for name in dict.fromkeys(label(row) for row in own):
            points = sorted((row["active_fraction"], row["cpu_speedup"]) for row in own if label(row) == name)
            (drawn,) = axes.plot(*zip(*points, strict=True), "o", label=name.removeprefix(f"{size}, "))
            if name in fitted:
                fixed, rising = fitted[name]
                told = f"  1 / ({fixed:.2f} + {rising:.2f} share)"
                axes.plot(shares, 1 / (fixed + rising * shares), color=drawn.get_color(), linewidth=1, label=told)
        axes.plot(shares, 1 / shares, ":", color="grey", label="1 / share")
        axes.axhline(1, color="grey", linewidth=0.5)
        axes.set(title=size, xlabel="computed share of tiles", ylim=(0, 1.5 * max(row["cpu_speedup"] for row in own)))
        axes.legend(fontsize=8)
    panels[0][0].set_ylabel("dense / sparse processor time of a chunk")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def plot_quality(rows: list[Row], path: Path) -> None:
    """Each figure by scenario, beside what it must reach."""
    lines = -(-len(PANELS) // COLUMNS)
    figure, panels = pyplot.subplots(
        lines, COLUMNS, figsize=(3 * COLUMNS, lines * (0.25 * len(rows) + 0.8)), squeeze=False, sharey=True
    )
    names = [label(row)[:28] for row in rows]
    for axes, (name, limits) in zip(panels.flat, PANELS.items(), strict=True):
        axes.barh(names, [row.get(name) or 0 for row in rows], color="#38b6ff")
        for limit in limits:
            axes.axvline(limit, color="black", linewidth=1)
        axes.set_title(name.replace("_", " "))
        if name == "ghost":  # else a trace of one would fill the panel
            axes.set_xlim(-0.1, 1)
    panels[0][0].invert_yaxis()  # shared by all: as in the tables
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(name: str, value: float | None) -> str:
    return "" if value is None else f"{value:.0f}" if name.endswith("_ms") else f"{value:.2f}"


def main(
    folder: Path,
    paths: Annotated[list[Path], typer.Argument(exists=True, dir_okay=False)],
    strips: Annotated[bool, typer.Option("--strips", help="Draw strips of pictures too.")] = False,
    dial: Annotated[float, typer.Option(min=0.01, max=1, help="Of the strips: from quality to speed.")] = 0.5,
) -> None:
    if strips:
        for path in draw_strips(Engine.load(), folder / "region-caching", dial):
            print(path)
    rows = [row for path in paths for row in json.loads(path.read_text())["regions"]]
    given = [row for row in rows if row["scenario"] == SPEED]
    free = [row for row in rows if row["scenario"] == FREE]
    carried = [row for row in rows if row["carry"]]
    scenarios = [row for row in rows if row["mask"] in ("own", "true") and not row["carry"]]
    if given:
        plot(given, folder / "region-speed.png")
        for name, (fixed, rising) in models(given).items():
            print(f"- {name}: sparse / dense = {fixed:.2f} + {rising:.2f} x share")
    if scenarios:
        plot_quality([row for row in scenarios if row["mask"] == "own"], folder / "region-quality.png")
    for told, names in (
        (given, TIMES),
        (scenarios, TIMES),
        (scenarios, LIKENESS),
        (carried, (*TIMES[:3], *LIKENESS)),
        (free, READ),
    ):
        if told:
            print(f"\n{table(told, names)}")


if __name__ == "__main__":
    typer.run(main)
