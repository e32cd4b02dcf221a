"""Tables and plots from results of `stillstream bench --regions --out`: speed against the share of tiles, and quality.

    .venv/bin/python benchmarks/regions.py docs one.json two.json
    .venv/bin/python benchmarks/regions.py docs one.json --strips

Measures nothing; with --strips the pocket student also draws dense chunks beside sparse ones.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from matplotlib import pyplot

from app.bench_regions import READ, TOLD
from app.region_strips import draw_strips
from pipeline.engine import Engine

LIMITS = {"psnr_active": 27.0, "ssim_active": 0.93, "static_error_ratio": 1.2}  # the last: at most


def table(rows: list[dict[str, Any]]) -> str:
    told = [name for name in (*TOLD, *READ) if any(row.get(name) is not None for row in rows)]
    lines = [_row("scenario", *(name.replace("_", " ") for name in told)), _row("---", *("---:" for _ in told))]
    for row in rows:
        cells = ("" if row.get(name) is None else f"{row[name]:.2f}" for name in told)
        lines.append(_row(row["scenario"] or f"{row['size']}, {row['mode']}", *cells))
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Speed-up against the share of tiles, beside what it would be if all work were shared out by tiles."""
    figure, axes = pyplot.subplots(figsize=(6, 4))
    for size in dict.fromkeys(row["size"] for row in rows):
        of = sorted((row["active_fraction"], row["cpu_speedup"]) for row in rows if row["size"] == size)
        axes.plot(*zip(*of, strict=True), "o-", label=size)
    shares = [0.05 + 0.01 * step for step in range(96)]
    axes.plot(shares, [1 / share for share in shares], ":", color="grey", label="work in proportion to tiles")
    axes.set(xlabel="computed share of tiles", ylabel="dense / sparse processor time of a chunk", ylim=(0, 8))
    axes.axhline(1, color="grey", linewidth=0.5)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def plot_quality(rows: list[dict[str, Any]], path: Path) -> None:
    """Likeness of the active area by scenario, beside what it must reach."""
    told = [row for row in rows if row.get("psnr_active") is not None]
    figure, both = pyplot.subplots(1, 3, figsize=(11, 0.4 * len(told) + 1.2), sharey=True)
    for axes, (name, least) in zip(both, LIMITS.items(), strict=True):
        axes.barh([row["scenario"][:24] for row in told], [row.get(name) or 0 for row in told], color="#38b6ff")
        axes.axvline(least, color="black", linewidth=1)
        axes.set_title(name.replace("_", " "))
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


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
    given = [row for row in rows if row["mode"] == "given mask"]
    if given:
        plot(given, folder / "region-speed.png")
        print(table(given), end="\n\n")
    scenarios = [row for row in rows if row["mode"] not in ("given mask", "carry")]
    if any(row.get("psnr_active") is not None for row in scenarios):
        plot_quality(scenarios, folder / "region-quality.png")
    for told in (scenarios, [row for row in rows if row["mode"] == "carry"]):
        if told:
            print(table(told), end="\n\n")


if __name__ == "__main__":
    typer.run(main)
