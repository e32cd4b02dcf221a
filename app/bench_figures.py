"""The figures of `stillstream bench`: their names, their units, the targets they are held against.

Pure: takes measured numbers, gives percentiles, rows and one flat dictionary. Measures nothing, prints nothing.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Value = float | int | str | bool | None
Report = dict[str, Value]

DENOISE = ("denoise_0", "denoise_1", "denoise_2", "denoise_3")
PASSES = (*DENOISE, "cache")
STAGES = ("text", "encode", *PASSES, "decode", "convert", "video_encode")
COUNTED = ("text", "encode", *PASSES, "decode")
SPREAD = ("p50", "p95")
LOADED = "loaded_"


@dataclass(frozen=True)
class Target:
    """A limit that the figure may touch."""

    limit: float
    at_least: bool = False

    def met(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.limit:g}"


@dataclass(frozen=True)
class Figure:
    """One measured number. digits: how exactly it is told, and judged: what is shown and the verdict must agree."""

    key: str
    label: str
    digits: int = 0
    target: Target | None = None

    def tell(self, value: Value) -> str:
        return f"{value:.{self.digits}f}" if isinstance(value, int | float) else "-"

    def verdict(self, report: Mapping[str, Value]) -> bool | None:
        """Whether the target is met; None without a target or a measurement."""
        value = report.get(self.key)
        if self.target is None or not isinstance(value, int | float):
            return None
        return self.target.met(round(value, self.digits))


LIVE = (
    Figure("fps_viewer", "Frames per second at the viewer", 1, Target(16, at_least=True)),
    Figure("frame_gap_ms_p99", "Frame to frame, p99 (ms)"),
    Figure("frame_gap_ms_max", "Frame to frame, longest (ms)"),
    Figure("generation_share", "Generation's share of real time", 2, Target(0.7)),
    Figure("chunk_ms_p50", "Chunk, p50 (ms)"),
    Figure("chunk_ms_p95", "Chunk, p95 (ms)"),
    Figure("first_frame_ms_p50", "Start to first frame, p50 (ms)"),
    Figure("first_frame_ms_p95", "Start to first frame, p95 (ms)", 0, Target(1500)),
    Figure("prompt_to_picture_ms_p50", "Prompt to picture, p50 (ms)"),
    Figure("prompt_to_picture_ms_p95", "Prompt to picture, p95 (ms)", 0, Target(1500)),
    Figure("prompt_to_change_ms_p50", "Prompt to plain change, p50 (ms)"),
    Figure("prompt_to_change_ms_p95", "Prompt to plain change, p95 (ms)"),
    Figure("prompt_changes", "Prompt changes sent"),
    Figure("prompt_changes_seen", "Prompt changes plainly seen"),
    Figure("server_latency_ms_p95", "Prompt to encoder, p95 (ms)"),
    Figure("loop_lag_ms_p99", "Event-loop lag, p99 (ms)", 1, Target(20)),
    Figure("dropped_frames", "Frames dropped in the calm part"),
    Figure("queue_frames_max", "Frames waiting, most"),
    Figure("rss_server_mb", "Memory of the server (MB)"),
    Figure("rss_worker_mb", "Memory of the worker (MB)"),
    Figure("rss_mb", "Memory in all (MB)", 0, Target(2500)),
)

ENGINE = (
    Figure("engine_start_s", "Worker from nothing to warm (s)", 1),
    Figure("engine_chunk_ms_p50", "Chunk, p50 (ms)", 1),
    Figure("engine_chunk_ms_p95", "Chunk, p95 (ms)", 1),
    Figure("engine_camera_chunk_ms_p50", "Chunk after a camera, p50 (ms)", 1),
    Figure("engine_camera_chunk_ms_p95", "Chunk after a camera, p95 (ms)", 1),
    Figure("engine_generation_share", "Generation's share of real time", 2, Target(0.7)),
    Figure("engine_fps", "Frames per second, all stages", 1, Target(16, at_least=True)),
    Figure("engine_dit_fps", "Frames per second, passes alone", 1),
    Figure("engine_decode_fps", "Frames per second, decode alone", 1),
    Figure("engine_floor_ms", "Floor of a chunk (ms)", 1),
    Figure("engine_gflop", "Operations of a chunk (GFLOP)", 1),
)

MACHINE = (
    "cpu",
    "cores",
    "instruction_set",
    "threads",
    "openmp_wait_policy",
    "matmul_student_gflops",
    "matmul_square_gflops",
    "matmul_gflops",
    "codec_precision",
    "matmul_codec_gflops",
    "model",
    "width",
    "height",
    "model_fps",
    "frames_per_chunk",
    "version_python",
    "version_stillstream",
    "version_torch",
    "version_diffusers",
    "version_aiortc",
    "version_av",
    "version_fastapi",
)


def percentile(values: Iterable[float], share: float) -> float | None:
    """Linear between the two nearest values; None when there are none."""
    found = list(values)
    return float(np.percentile(found, share)) if found else None


def spread(key: str, values: Iterable[float]) -> Report:
    """`<key>_p50` and `<key>_p95`."""
    found = list(values)
    return {f"{key}_{name}": percentile(found, float(name[1:])) for name in SPREAD}


def bucket_percentile(counts: Sequence[tuple[float, float]], share: float) -> float | None:
    """From a histogram's (upper edge, observations up to it), linear inside a bucket.

    Exact about which side of an edge the percentile lies on; above the last finite edge it is that edge.
    """
    total = counts[-1][1] if counts else 0
    if not total:
        return None
    wanted, below, low = total * share / 100, 0.0, 0.0
    for edge, up_to in counts:
        if up_to >= wanted and up_to > below:
            return low if edge == float("inf") else low + (edge - low) * (wanted - below) / (up_to - below)
        below, low = up_to, edge
    return low


def blank() -> Report:
    """Every key, nothing measured."""
    stages = [f"{stage}_ms_{name}" for stage in STAGES for name in SPREAD]
    floors = [f"{stage}_{what}" for stage in COUNTED for what in ("gflop", "floor_ms")]
    live = [figure.key for figure in LIVE]
    met = [f"{figure.key}_met" for figure in (*ENGINE, *LIVE) if figure.target]
    keys = (
        *MACHINE,
        *(figure.key for figure in ENGINE),
        *stages,
        *floors,
        *live,
        *(LOADED + key for key in live),
        *met,
    )
    return dict.fromkeys(keys)


def finish(measured: Mapping[str, Value]) -> Report:
    """All keys in a steady order, numbers rounded, verdicts added."""
    report = blank() | dict(measured)
    report |= {f"{figure.key}_met": figure.verdict(report) for figure in (*ENGINE, *LIVE) if figure.target}
    return {key: round(value, 3) if isinstance(value, float) else value for key, value in report.items()}


def line(report: Mapping[str, Value]) -> str:
    """The report as one line of strict JSON."""
    return json.dumps(report, allow_nan=False)


def verdict_word(figure: Figure, report: Mapping[str, Value]) -> str:
    return {True: "met", False: "not met", None: ""}[figure.verdict(report)]


def engine_rows(report: Mapping[str, Value]) -> list[tuple[str, ...]]:
    """Label, value, target, verdict."""
    return [
        (each.label, each.tell(report.get(each.key)), str(each.target or ""), verdict_word(each, report))
        for each in ENGINE
    ]


def stage_rows(report: Mapping[str, Value]) -> list[tuple[str, ...]]:
    """Stage, p50, p95, floor, operations. A dash where a stage has none."""

    def tell(key: str) -> str:
        value = report.get(key)
        return f"{value:.2f}" if isinstance(value, int | float) else "-"

    ends = ("ms_p50", "ms_p95", "floor_ms", "gflop")
    return [(stage, *(tell(f"{stage}_{end}") for end in ends)) for stage in STAGES]


def live_rows(report: Mapping[str, Value]) -> list[tuple[str, ...]]:
    """Label, value, value under load, target, verdict: the targets are for a machine that does nothing else."""
    return [
        (
            each.label,
            each.tell(report.get(each.key)),
            each.tell(report.get(LOADED + each.key)),
            str(each.target or ""),
            verdict_word(each, report),
        )
        for each in LIVE
    ]
