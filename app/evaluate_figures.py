"""The rows of `stillstream eval`: what was found, the targets it is held against, the line of JSON.

Pure: takes measured values, gives rows and text. What was not measured is None here and says so everywhere.
"""

import json
import math
from dataclasses import dataclass

import numpy as np

from app.bench_figures import Figure, Report, Target
from pipeline.training.evaluate import Quality, StepsRow
from pipeline.training.evaluate_streams import Drift, DriftPoint, Switched
from pipeline.training.measures import Noise, score
from pipeline.training.probe import Bounds

NOT_MEASURED = "not measured"
TOO_WEAK = "probe too weak"
POINTS = 100  # of accuracy, 0 to 1
ENOUGH = 0.8  # of the words in renders: a probe that reads fewer says more about itself than about the model


@dataclass(frozen=True)
class Findings:
    """real: renders of the same scenes. floor: the same against other captions. bounds: the probe itself, on more.

    distance: of features, to the renders. steps: the row of 50 is the guided teacher's if there is one. unguided_ms: a
    chunk of 50 steps without guidance. noises: of the background, one a clip; NaN where there was too little of it.
    """

    clips: int
    real: Quality
    floor: dict[str, float]
    bounds: Bounds
    student: Quality
    student_distance: float
    teacher: Quality | None
    teacher_distance: float | None
    unguided_ms: float
    steps: list[StepsRow]
    drift: Drift
    switched: Switched
    codec_psnr_renders: float
    codec_psnr_generic: float
    streaming_gap: float
    noises: list[Noise]


FIGURES = (
    Figure("probe_ratio", "Attribute probe, 4 steps, share of its accuracy on real renders", 2, Target(0.9, True)),
    Figure("probe_gap_to_teacher", "4 steps behind the 50-step teacher, points of the same measure", 1, Target(3)),
    Figure("fd_ratio", "Feature distance to real renders, 4 steps, times the teacher's", 2, Target(1.5)),
    Figure("steps_speed_up", "4 steps faster than 50, times, whole chunks", 1, Target(10, True)),
    Figure("motion_error", "Motion, median error of the velocity, share of the captioned one", 3, Target(0.15)),
    Figure("still_share", "Share of clips that do not move although they should", 3, Target(0.03)),
    Figure("drift_lost_4000", "Drift, points lost at frame 4000", 1, Target(3)),
    Figure("drift_kept_20000", "Drift, share of the opening's accuracy kept at frame 20000", 2, Target(0.5, True)),
    Figure("switch_rate", "Prompt switch, the probe agrees within 2 chunks, share of switches", 2, Target(0.8, True)),
    Figure("codec_psnr_renders", "Autoencoder on renders (dB)", 1, Target(32, True)),
    Figure("codec_psnr_generic", "Autoencoder on generic content (dB)", 1, Target(26, True)),
    Figure("streaming_gap", "Autoencoder, streaming against batch, largest difference", 7, Target(1e-5)),
    Figure("background_noise", "Still background, changes beside the mover, times the codec's own", 2, Target(1)),
)
BY_PROBE = {
    figure.key
    for figure in FIGURES
    if figure.key
    not in ("steps_speed_up", "codec_psnr_renders", "codec_psnr_generic", "streaming_gap", "background_noise")
}
KEYS = (
    "probe_ratio",
    "probe_gap_to_teacher",
    "fd_ratio",
    "steps",
    "motion_error",
    "still_share",
    "drift",
    "switch_rate",
    "codec_psnr_renders",
    "codec_psnr_generic",
    "background_noise",
)


def values(found: Findings) -> Report:
    """A number for each figure, or None."""
    times_ms = {row.steps: row.ms for row in found.steps}
    drifted = {  # the opening of the same streams, and what they are at a later frame
        point.frame: (point.opening, point.quality.score)
        for point in found.drift.points
        if point.quality is not None and point.opening is not None
    }
    ratios = [noise.ratio for noise in found.noises if math.isfinite(noise.ratio)]
    student, teacher, apart = found.student.score, found.teacher, found.teacher_distance
    return {
        "probe_ratio": _share(student, found.real.score),
        "probe_gap_to_teacher": POINTS * (teacher.score - student) if teacher else None,
        "fd_ratio": _share(found.student_distance, apart) if apart is not None else None,
        "steps_speed_up": _share(times_ms[50], times_ms[4]) if {4, 50} <= times_ms.keys() else None,
        "motion_error": found.student.motion_error,
        "still_share": found.student.still_share,
        "drift_lost_4000": POINTS * (drifted[4000][0] - drifted[4000][1]) if 4000 in drifted else None,
        "drift_kept_20000": _share(drifted[20000][1], drifted[20000][0]) if 20000 in drifted else None,
        "switch_rate": found.switched.rate,
        "codec_psnr_renders": found.codec_psnr_renders,
        "codec_psnr_generic": found.codec_psnr_generic,
        "streaming_gap": found.streaming_gap,
        "background_noise": float(np.median(ratios)) if ratios else None,
    }


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


@dataclass(frozen=True)
class Row:
    measure: str
    target: str
    measured: str
    reached: str


def doubtful(found: Findings) -> bool:
    """Whether the probe reads too little of real renders to judge a model by."""
    return score(found.bounds.ceiling) < ENOUGH


def rows(found: Findings) -> list[Row]:
    """One a measure of the table; a measure is judged as it is told, so rounding cannot flatter it. A weak probe
    judges nothing."""
    told, report = [], values(found)
    for figure in FIGURES:
        verdict = figure.verdict(report)
        said = NOT_MEASURED if verdict is None else figure.tell(report[figure.key])
        reached = {True: "reached", False: "not reached", None: NOT_MEASURED}[verdict]
        if verdict is not None and figure.key in BY_PROBE and doubtful(found):
            reached = TOO_WEAK
        told.append(Row(figure.label, str(figure.target), said, reached))
    return told


def line(found: Findings) -> str:
    """The findings as one line of strict JSON, KEYS in their order."""
    report = values(found)
    lists = {
        "steps": [{"steps": row.steps, "quality": _exact(row.quality), "ms": _exact(row.ms)} for row in found.steps],
        "drift": [_drifted(point) for point in found.drift.points],
    }
    return json.dumps({key: lists[key] if key in lists else _exact(report[key]) for key in KEYS}, allow_nan=False)


def _drifted(point: DriftPoint) -> dict[str, object]:
    quality = point.quality
    return {
        "frame": point.frame,
        "streams": point.streams,
        "quality": _exact(quality.score) if quality else None,
        "motion_error": _exact(quality.motion_error) if quality else None,
        "still_share": _exact(quality.still_share) if quality else None,
    }


def _exact(value: object) -> float | None:
    return round(value, 4) if isinstance(value, int | float) and math.isfinite(value) else None
