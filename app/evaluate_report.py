"""The page that an evaluation writes, in Markdown: tables, plots and sheets, and how to read them.

What a person wrote under its last heading, "What to try next", stays when the page is written again.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from app.evaluate_figures import NOT_MEASURED, Findings, doubtful, rows
from pipeline.training.evaluate_streams import DriftPoint
from pipeline.training.measures import SCORED, score
from pipeline.training.probe_clips import ATTRIBUTES

NOTES = "## What to try next"
NO_NOTES = "Nothing written yet. What stands here stays when the page is written again."


@dataclass(frozen=True)
class Told:
    """What the page says beside the figures. plan: how much was measured. probe: where it came from. prompts: of the
    sheet, in its order."""

    command: str
    machine: str
    model: str
    teacher: str
    plan: str
    took_s: float
    probe: str
    prompts: Sequence[str]
    camera_prompts: Sequence[str]
    switches: Sequence[tuple[str, str]]


def page(found: Findings, told: Told, folder: str, notes: str = NO_NOTES) -> str:
    """folder: of the pictures, as the page links to them."""
    parts = [
        "# What the student reaches",
        f"Written by `{told.command}` on {told.machine}, in {told.took_s / 60:.1f} minutes. Model: {told.model}. "
        f"Teacher: {told.teacher}. Measured were {told.plan}. A clip has two seconds and is the opening of a stream of "
        "its own; scenes and captions are drawn from seeds that no training uses.",
        _table(
            ("measure", "must reach", "measured", ""),
            ((r.measure, r.target, r.measured, r.reached) for r in rows(found)),
        ),
        "## Attributes",
        f"{_probe(found)} {told.probe} Below, every column is read from the same {found.clips} scenes and asks only "
        "for what a caption says; the last one holds each render against another clip's caption.",
        _attributes(found),
        f"![Right words by attribute]({folder}/attributes.png)",
        f"Feature distance to the renders: {found.student_distance:.2f} at 4 steps, for the teacher "
        f"{_number(found.teacher_distance, 2)}. It is taken from {found.clips} clips a side; from so few, their ratio "
        "says more than each alone.",
        "## Steps",
        "Quality is the mean over the five attributes, on the same clips in every row; time is the median of a whole "
        f"chunk, all stages, after one of its own; the models take turns. {_fifty(found)}",
        _steps(found),
        f"![Quality and time]({folder}/steps.png)",
        "## Motion",
        _motion(found),
        "## Drift",
        f"Streams of their own, a clip read at each frame; a loss is against the opening of the same streams. Over "
        f"{len(found.drift.strips)} streams one answer of the probe is worth "
        f"{100 / max(1, len(found.drift.strips) * len(SCORED)):.1f} points, so small differences are chance.",
        _table(
            ("frame", "streams", "right", "points lost", "motion error", "do not move"),
            (_drift(point) for point in found.drift.points),
        ),
        f"![Quality along the stream]({folder}/drift.png)",
        f"![A row a stream, a picture at each measured frame]({folder}/drift-strips.jpg)",
        "## Prompt switches",
        f"Subject, colour, place and style change together, and all that the new prompt names must be read from the "
        f"second chunk: {_share(found.switched.rate)} of {len(found.switched.strips)} switches. From renders of the "
        f"new scenes, the probe reads {_share(found.switched.ceiling)}. Left the last picture before the change, then "
        "the two chunks after it.",
        f"![A row a switch]({folder}/switches.jpg)",
        _numbered(f"{before} -> {after}" for before, after in told.switches),
        "## Autoencoder and background",
        f"{found.codec_psnr_renders:.1f} dB on renders, {found.codec_psnr_generic:.1f} dB on generic content; chunk by "
        f"chunk and all at once differ by {found.streaming_gap:.1e} at most. {_noise(found)}",
        "## Prompts",
        "Four pictures a prompt, half a second apart, two prompts a row:",
        f"![Contact sheet of prompts]({folder}/prompts.jpg)",
        _numbered(told.prompts),
        "## Camera",
        "Generic clips as the camera. Three pictures each: the camera, strength 0.3, strength 0.6, and strength 0.9 "
        "with all of the outlines.",
        f"![Contact sheet of camera clips]({folder}/camera.jpg)",
        _numbered(told.camera_prompts),
        NOTES,
        notes,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def kept_notes(path: Path) -> str:
    """What a person wrote on the page that is there."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return text.partition(f"\n{NOTES}\n")[2].strip() or NO_NOTES


def _probe(found: Findings) -> str:
    bounds = found.bounds
    error = bounds.motion.median_error
    return (
        f"On held-out renders the probe reads {_share(score(bounds.ceiling))} of the words, and agrees with other "
        f"clips' captions in {_share(score(bounds.floor))}. Its centres are off by {bounds.centre_px:.1f} pixels, its "
        f"velocities by {_share(error)} (medians).{_doubt(found)}"
    )


def _doubt(found: Findings) -> str:
    return " **That is too little to judge a model by; it needs a longer training.**" if doubtful(found) else ""


def _attributes(found: Findings) -> str:
    columns = [found.real.agreed, found.student.agreed, found.teacher.agreed if found.teacher else None, found.floor]
    lines = [
        (name, *(_share(agreed.get(name)) if agreed is not None else NOT_MEASURED for agreed in columns))
        for name in ATTRIBUTES
    ]
    means = [_share(_mean(agreed)) if agreed is not None else NOT_MEASURED for agreed in columns]
    lines.append((f"mean of {', '.join(SCORED)}", *means))
    return _table(("attribute", "renders", "4 steps", "teacher", "other captions"), lines)


def _mean(agreed: dict[str, float]) -> float:
    return score(agreed, [name for name in SCORED if name in agreed])


def _fifty(found: Findings) -> str:
    if found.teacher is None:
        return "The row of 50 is the same weights in 50 passes, without guidance."
    ms = {row.steps: row.ms for row in found.steps}
    return (
        "The row of 50 is the teacher, guided, so each of its steps is two passes: a few steps of the student, which "
        f"learnt the guidance in, stand in for that. Without guidance a chunk of 50 takes {found.unguided_ms:.0f} ms, "
        f"{found.unguided_ms / ms[4]:.1f} times that of 4."
    )


def _steps(found: Findings) -> str:
    lines = ((str(row.steps), _share(row.quality), f"{row.ms:.0f}") for row in found.steps)
    return _table(("steps", "right", "ms a chunk"), lines)


def _motion(found: Findings) -> str:
    columns = (("renders", found.real), ("4 steps", found.student), ("teacher", found.teacher))
    lines = [
        (name, _share(each.motion_error), _share(each.still_share)) if each else (name, NOT_MEASURED, NOT_MEASURED)
        for name, each in columns
    ]
    return _table(("", "median error of the velocity", "do not move although they should"), lines)


def _drift(point: DriftPoint) -> tuple[str, ...]:
    quality = point.quality
    if quality is None or point.opening is None:
        return (str(point.frame), "0", *[NOT_MEASURED] * 4)
    lost = f"{100 * (point.opening - quality.score):.1f}"
    read = (_share(quality.score), lost, _share(quality.motion_error), _share(quality.still_share))
    return (str(point.frame), str(point.streams), *read)


def _noise(found: Findings) -> str:
    seen = [noise for noise in found.noises if noise.made == noise.made]
    if not seen:
        return "No clip left enough background beside its mover to judge how still it is."
    made, codec = (sum(getattr(noise, name) for noise in seen) / len(seen) for name in ("made", "codec"))
    return (
        f"Beside the mover's path, pixels change by {made:.2f} levels of 255 in made clips and by {codec:.2f} in coded "
        f"renders (means of {len(seen)} clips; the table has the median of their ratios)."
    )


def _share(value: float | None) -> str:
    """In per cent. A share that nothing asked for is a dash."""
    return f"{100 * value:.1f} %" if value is not None else "-"


def _number(value: float | None, digits: int = 0) -> str:
    return f"{value:.{digits}f}" if value is not None else NOT_MEASURED


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *lines))


def _numbered(lines: Iterable[str]) -> str:
    return "\n".join(f"{number}. {text}" for number, text in enumerate(lines, 1))
