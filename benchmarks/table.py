"""Prints results of `stillstream bench --out` side by side, as a Markdown table: one column for each file.

    .venv/bin/python benchmarks/table.py one.json two.json

Measures nothing.
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from app.bench_figures import ENGINE, LIVE, LOADED, STAGES, Figure, Report

STAGE_FIGURES = tuple(Figure(f"{stage}_ms_p50", f"{stage}, p50 (ms)", 1) for stage in STAGES)
LOADED_FIGURES = tuple(Figure(LOADED + each.key, f"Cores busy: {each.label}", each.digits) for each in LIVE)


def table(reports: dict[str, Report]) -> str:
    """The figures that at least one of the reports has."""
    lines = [_row("", *reports), _row("---", *("---:" for _ in reports))]
    for figure in (*ENGINE, *STAGE_FIGURES, *LIVE, *LOADED_FIGURES):
        cells = [report.get(figure.key) for report in reports.values()]
        if any(cell is not None for cell in cells):
            told = ["not measured" if cell is None else figure.tell(cell) for cell in cells]
            lines.append(_row(figure.label, *told))
    return "\n".join(lines)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def main(paths: Annotated[list[Path], typer.Argument(exists=True, dir_okay=False)]) -> None:
    print(table({path.stem: json.loads(path.read_text()) for path in paths}))


if __name__ == "__main__":
    typer.run(main)
