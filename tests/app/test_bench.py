"""What the bench makes of its measurements; nothing here depends on how fast this machine is."""

import json
import os
import subprocess
import sys
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from app import bench_figures as figures
from app.bench import REGIONS, plan_for, regions_tables
from app.bench_engine import codec_shapes, floors, student_shapes
from app.bench_figures import ENGINE, LIVE, LOADED, Figure, Target, bucket_percentile, percentile
from app.bench_live import Memory, Watched, summarise
from app.bench_regions import KEYS, READ, TOLD
from app.bench_viewer import PromptChange, Seen, Sight, first_that_stands_out
from tests.app.tiny import TINY


def sights(levels: list[int], step_s: float = 0.0625) -> list[Sight]:
    return [Sight(index * step_s, np.full((24, 40, 3), level, np.uint8)) for index, level in enumerate(levels)]


def test_a_percentile_lies_between_its_neighbours() -> None:
    assert percentile([3, 1, 2], 50) == 2
    assert percentile(range(101), 95) == 95
    assert percentile([1, 2], 75) == 1.75


def test_a_percentile_of_nothing_is_nothing() -> None:
    assert percentile([], 95) is None
    assert figures.spread("chunk_ms", []) == {"chunk_ms_p50": None, "chunk_ms_p95": None}


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([(10, 990), (20, 1000), (float("inf"), 1000)], 10),
        ([(10, 98), (20, 100), (float("inf"), 100)], 15),
        ([(10, 0), (20, 50), (float("inf"), 100)], 20),
        ([(10, 0), (20, 0), (float("inf"), 0)], None),
        ([], None),
    ],
)
def test_a_histogram_tells_its_percentile(counts: list[tuple[float, float]], expected: float | None) -> None:
    assert bucket_percentile(counts, 99) == expected


def test_a_figure_is_judged_as_it_is_told() -> None:
    rate = Figure("fps", "Frames per second", 1, Target(16, at_least=True))

    assert (rate.tell(15.96), rate.verdict({"fps": 15.96})) == ("16.0", True)
    assert (rate.tell(15.94), rate.verdict({"fps": 15.94})) == ("15.9", False)


def test_what_was_not_measured_has_no_verdict() -> None:
    report = figures.finish({})

    assert [report[f"{each.key}_met"] for each in (*ENGINE, *LIVE) if each.target] == [None] * 8
    assert {row[1] for row in figures.live_rows(report)} == {"-"}


def test_a_missed_target_is_said_and_the_busy_machine_stands_beside() -> None:
    report = figures.finish({"chunk_ms_p95": 40.4, "fps_viewer": 12.0, f"{LOADED}fps_viewer": 7.0})
    rows = {row[0]: row[1:] for row in figures.live_rows(report)}

    assert report["fps_viewer_met"] is False
    assert rows["Frames per second at the viewer"] == ("12.0", "7.0", ">= 16", "not met")
    assert rows["Chunk, p95 (ms)"] == ("40", "-", "", "")


def test_every_key_is_there_in_the_same_order_whatever_was_measured() -> None:
    assert list(figures.finish({"fps_viewer": 16.0, "cores": 2})) == list(figures.blank())


def test_the_line_is_strict_json() -> None:
    text = figures.line(figures.finish({"cpu": 'A "fast" one', "chunk_ms_p50": np.float64(1.23456).item()}))

    assert "\n" not in text
    assert json.loads(text)["chunk_ms_p50"] == 1.235


def test_a_floor_counts_the_passes_and_the_decoder_only() -> None:
    gflop = {"text": 1.0, "encode": 1.0, "denoise_0": 2.0, "cache": 2.0, "decode": 4.0, "convert": 0.0}
    report = floors(gflop, matmul_gflops=100, codec_gflops=200)

    assert (report["engine_gflop"], report["engine_floor_ms"]) == (8.0, 60.0)
    assert report["encode_floor_ms"] == 5.0
    assert "convert_floor_ms" not in report


def test_products_have_the_shapes_of_the_model() -> None:
    assert set(student_shapes(TINY)) == {(2, 24, 24), (2, 24, 48), (2, 48, 24)}
    assert codec_shapes(TINY) == [(8, 144, 16), (32, 108, 12), (128, 72, 8)]


def test_a_new_scene_stands_out_and_a_flicker_does_not() -> None:
    known = sights([100, 104, 100, 104])

    assert first_that_stands_out(known, sights([105, 99])) is None
    found = first_that_stands_out(known, sights([104, 108, 140]))
    assert found is not None
    assert found.small_HWC[0, 0, 0] == 140


def test_what_the_viewer_saw_becomes_figures() -> None:
    stats = [{"chunk_ms": 100, "dropped_frames": 8, "queue_frames": 3}] * 2
    changes = [PromptChange(100, 200, None), PromptChange(100, 300, 900)]
    seen = Seen([500.0, 700.0], sights([1, 2, 3]), stats, changes)
    watched = Watched(seen, [Memory(1, 2, 3), Memory(2, 1, 3)], [(10, 99), (20, 100), (float("inf"), 100)])

    report = summarise(watched, chunk_s=0.5)

    assert (
        report.items()
        >= {
            "fps_viewer": 16.0,
            "frame_gap_ms_max": 62.5,
            "generation_share": 0.2,
            "first_frame_ms_p50": 600.0,
            "prompt_to_picture_ms_p50": 250.0,
            "prompt_to_change_ms_p95": 900.0,
            "prompt_changes": 2,
            "prompt_changes_seen": 1,
            "loop_lag_ms_p99": 10.0,
            "dropped_frames": 0,
            "rss_server_mb": 2,
            "rss_worker_mb": 2,
        }.items()
    )
    assert set(report) == {figure.key for figure in LIVE}


def test_a_viewer_who_saw_nothing_becomes_no_figures() -> None:
    report = summarise(Watched(Seen()), chunk_s=0.5)

    assert {key for key, value in report.items() if value} == set()


def test_a_short_run_asks_for_less() -> None:
    assert plan_for(1).sessions < plan_for(30).sessions


def test_a_run_of_the_engine_alone_ends_with_one_line_that_has_every_key(tiny_model: Path) -> None:
    words = ["--no-live", "--seconds", "0.1", "--threads", "1", "--model", str(tiny_model)]
    ended = subprocess.run(
        [sys.executable, "-m", "app", "bench", *words],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"COLUMNS": "100"},
        check=False,
    )

    assert (ended.returncode, "Traceback" in ended.stderr) == (0, False), ended.stderr
    report = json.loads(ended.stdout.splitlines()[-1])
    live = {figure.key for figure in LIVE}
    absent = live | {LOADED + key for key in live} | {f"{figure.key}_met" for figure in LIVE if figure.target}
    assert list(report) == list(figures.blank())
    assert {key for key, value in report.items() if value is None} == absent
    assert all(report[f"{stage}_ms_p50"] > 0 for stage in figures.STAGES)
    assert "Engine alone" in ended.stdout
    assert "Live" not in ended.stdout


def test_a_folder_that_is_missing_is_said_before_anything_is_measured(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "app", "bench", "--out", str(tmp_path / "no" / "figures.json")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert ended.returncode == 2
    assert ended.stderr.startswith("out_unwritable: ")
    assert ended.stdout == ""


def test_tables_of_regions_fit_eighty_columns_and_leave_out_what_nobody_measured() -> None:
    assert {key for names in REGIONS.values() for key in names} == {*TOLD, *READ}
    text = dict.fromkeys(KEYS, 0.123456) | {"size": "320x192", "mode": "text", "scenario": "a red ball " * 8}
    given = dict.fromkeys(KEYS) | {"size": "640x384 random", "mode": "painted", "scenario": "speed", "speedup": 12.345}
    console = Console(width=80, record=True, file=StringIO())
    for table in regions_tables([text, given]):
        console.print(table)
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    printed = "\n".join(lines)
    assert all(name in printed for names in REGIONS.values() for name in names.values())
    assert printed.count("640x384 random, painted") == 1
    assert printed.count("12.35") + printed.count("12.34") == 1
    alone = regions_tables([given])
    assert [len(table.columns) for table in alone] == [2]
