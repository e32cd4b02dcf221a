"""The plots of an evaluation, as PNG. matplotlib is loaded when the first is drawn; serving needs none of it."""

from pathlib import Path
from typing import TYPE_CHECKING

from app.evaluate_figures import Findings
from pipeline.training.measures import SCORED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Plot

COLOURS = {"renders": "#6b7280", "4 steps": "#2563eb", "teacher": "#d97706", "other captions": "#d1d5db"}


def _plot() -> "tuple[Plot, Axes]":
    # The figure alone, without pyplot: no window, no state that outlives the call.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.2), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def write_plots(found: Findings, folder: Path) -> None:
    """`attributes.png`, `steps.png` and `drift.png`."""
    attributes(found, folder / "attributes.png")
    steps(found, folder / "steps.png")
    drift(found, folder / "drift.png")


def attributes(found: Findings, path: Path) -> None:
    figure, axes = _plot()
    bars = {"renders": found.real.agreed, "4 steps": found.student.agreed}
    if found.teacher is not None:
        bars["teacher"] = found.teacher.agreed
    bars["other captions"] = found.floor
    width = 0.8 / len(bars)
    for place, (name, agreed) in enumerate(bars.items()):
        at = [column + width * place for column in range(len(SCORED))]
        axes.bar(at, [100 * agreed.get(word, 0.0) for word in SCORED], width, label=name, color=COLOURS[name])
    axes.set_xticks([column + 0.4 - width / 2 for column in range(len(SCORED))], SCORED)
    axes.set_ylabel("right, % of clips")
    axes.set_ylim(0, 100)
    axes.legend(frameon=False, ncols=len(bars), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.savefig(path)


def steps(found: Findings, path: Path) -> None:
    figure, axes = _plot()
    axes.plot([row.ms for row in found.steps], [100 * row.quality for row in found.steps], "o-", color="#2563eb")
    for row in found.steps:
        axes.annotate(f" {row.steps}", (row.ms, 100 * row.quality), va="bottom")
    axes.set_xscale("log")
    axes.set_xticks([row.ms for row in found.steps], [f"{row.ms:.0f}" for row in found.steps])
    axes.minorticks_off()
    axes.set_xlabel("a chunk, ms; the number of steps beside each point")
    axes.set_ylabel("right, %")
    axes.set_ylim(0, 100)
    figure.savefig(path)


def drift(found: Findings, path: Path) -> None:
    figure, axes = _plot()
    points = [(point.frame, 100 * point.quality.score) for point in found.drift.points if point.quality is not None]
    axes.plot([str(frame) for frame, _ in points], [score for _, score in points], "o-", color="#2563eb")
    axes.set_xlabel("frame of the stream")
    axes.set_ylabel("right, %")
    axes.set_ylim(0, 100)
    figure.savefig(path)
