"""What an evaluation tells: every row, one strict line, a page that keeps what a person wrote, and clear mistakes."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from app import evaluate_figures as figures
from app.errors import AppError
from app.evaluate import QUICK, Plan, Wanted, evaluate, prepare
from app.evaluate_figures import FIGURES, KEYS, Findings
from app.evaluate_report import NO_NOTES, NOTES, Told, kept_notes, page
from pipeline.errors import PipelineError
from pipeline.training import loop
from pipeline.training.evaluate import STEP_COUNTS, Quality, StepsRow
from pipeline.training.evaluate_streams import DRIFT_FRAMES, Drift, DriftPoint, Switched
from pipeline.training.measures import SCORED, Motion, Noise
from pipeline.training.probe import Bounds, Probe, load_probe, save_probe
from pipeline.training.teacher import Denoiser
from tests.app.tiny import TINY

ROOT = Path(__file__).parents[2]
SMALLEST = Plan(clips=4, drift_frames=0, streams=1, probe_clips=4, codec_clips=1, rounds=1, quick=True)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def all_right(share: float, error: float | None = 0.1, still: float | None = 0.0) -> Quality:
    return Quality(dict.fromkeys(SCORED, share), error, still)


def drifted(frame: int, share: float) -> DriftPoint:
    return DriftPoint(frame, all_right(share), streams=3, opening=0.8)


def findings() -> Findings:
    nothing = np.zeros(0)
    return Findings(
        clips=10,
        real=all_right(0.9),
        floor=dict.fromkeys(SCORED, 0.2),
        bounds=Bounds(dict.fromkeys(SCORED, 0.95), dict.fromkeys(SCORED, 0.2), 1.0, Motion(nothing, nothing, nothing)),
        student=all_right(0.81, 0.1504, 0.03),
        student_distance=6.0,
        teacher=all_right(0.85),
        teacher_distance=3.0,
        unguided_ms=400.0,
        steps=[StepsRow(steps, 0.5, 10.0 * steps) for steps in STEP_COUNTS],
        drift=Drift([drifted(frame, 0.8) if frame <= 4000 else DriftPoint(frame) for frame in DRIFT_FRAMES], []),
        switched=Switched(0.75, 0.9, []),
        codec_psnr_renders=32.04,
        codec_psnr_generic=25.94,
        streaming_gap=2e-6,
        noises=[Noise(1.0, 2.0), Noise(float("nan"), float("nan")), Noise(3.0, 2.0)],
    )


TOLD = Told(
    command="stillstream eval",
    machine="a machine",
    model="tiny",
    teacher="none at hand",
    plan="10 clips a row",
    took_s=90.0,
    probe="It was given.",
    prompts=["red ball"],
    camera_prompts=["blue"],
    switches=[("a", "b")],
)


def told_rows(found: Findings) -> dict[str, tuple[str, str]]:
    return {figure.key: (row.measured, row.reached) for figure, row in zip(FIGURES, figures.rows(found), strict=True)}


def test_each_row_is_judged_as_it_is_told() -> None:
    assert told_rows(findings()) == {
        "probe_ratio": ("0.90", "reached"),
        "probe_gap_to_teacher": ("4.0", "not reached"),
        "fd_ratio": ("2.00", "not reached"),
        "steps_speed_up": ("12.5", "reached"),
        "motion_error": ("0.150", "reached"),
        "still_share": ("0.030", "reached"),
        "drift_lost_4000": ("0.0", "reached"),
        "drift_kept_20000": ("not measured", "not measured"),
        "switch_rate": ("0.75", "not reached"),
        "codec_psnr_renders": ("32.0", "reached"),
        "codec_psnr_generic": ("25.9", "not reached"),
        "streaming_gap": ("0.0000020", "reached"),
        "background_noise": ("1.00", "reached"),
    }


def test_without_a_teacher_and_long_streams_their_rows_are_not_measured_and_nothing_stands_in_for_them() -> None:
    drift = Drift([DriftPoint(frame) if frame else drifted(frame, 0.8) for frame in DRIFT_FRAMES], [])
    found = replace(findings(), teacher=None, teacher_distance=None, drift=drift, noises=[])
    rows = told_rows(found)
    absent = {key for key, row in rows.items() if row == ("not measured", "not measured")}
    report = json.loads(figures.line(found))
    assert absent == {
        "probe_gap_to_teacher",
        "fd_ratio",
        "drift_lost_4000",
        "drift_kept_20000",
        "background_noise",
    }
    assert {key for key, value in report.items() if value is None} == absent & set(KEYS)
    assert [point["quality"] for point in report["drift"]] == [0.8, None, None, None, None]
    assert page(found, TOLD, "student").count("not measured") > len(absent)


def test_a_stream_that_collapses_late_is_told() -> None:
    points = [drifted(frame, 0.8 if frame < 4000 else 0.3) for frame in DRIFT_FRAMES]
    rows = told_rows(replace(findings(), drift=Drift(points, [])))
    assert rows["drift_lost_4000"] == ("50.0", "not reached")
    assert rows["drift_kept_20000"] == ("0.37", "not reached")


def test_the_line_has_exactly_the_keys_of_the_table_and_is_strict_json() -> None:
    text = figures.line(replace(findings(), student=all_right(0.81, None, None)))
    report = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert "\n" not in text
    assert tuple(report) == KEYS
    assert report["steps"] == [{"steps": steps, "quality": 0.5, "ms": 10.0 * steps} for steps in STEP_COUNTS]
    assert [point["frame"] for point in report["drift"]] == list(DRIFT_FRAMES)
    assert report["motion_error"] is None


def test_the_page_has_every_row_and_every_picture() -> None:
    text = page(findings(), TOLD, "student")
    for row in figures.rows(findings()):
        assert f"| {row.measure} | {row.target} | {row.measured} | {row.reached} |" in text
    plots, sheets = ("attributes", "steps", "drift"), ("drift-strips", "switches", "prompts", "camera")
    for name in (*(f"{plot}.png" for plot in plots), *(f"{sheet}.jpg" for sheet in sheets)):
        assert f"](student/{name})" in text
    assert "1. a -> b" in text
    assert text.rstrip().endswith(NO_NOTES)


def test_a_probe_that_reads_little_of_renders_judges_nothing() -> None:
    weak = replace(findings(), bounds=replace(findings().bounds, ceiling=dict.fromkeys(SCORED, 0.5)))
    verdicts = {key: reached for key, (_, reached) in told_rows(weak).items()}
    free = ("steps_speed_up", "codec_psnr_renders", "codec_psnr_generic", "streaming_gap", "background_noise")
    assert {key for key, reached in verdicts.items() if reached in ("reached", "not reached")} == set(free)
    assert verdicts["probe_ratio"] == "probe too weak"
    assert verdicts["drift_kept_20000"] == "not measured"
    assert "too little to judge" in page(weak, TOLD, "student")
    assert "too little to judge" not in page(findings(), TOLD, "student")


def test_what_a_person_wrote_stays_when_the_page_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "student.md"
    assert kept_notes(path) == NO_NOTES
    path.write_text(page(findings(), TOLD, "student", "More steps.\n\n### And\n\nanother codec."))
    assert kept_notes(path) == "More steps.\n\n### And\n\nanother codec."
    assert path.read_text().count(NOTES) == 1


def test_a_few_streams_go_on_to_the_last_frame_and_the_others_end_where_points_are_judged() -> None:
    assert Plan(streams=4).untils == [20000, 20000, 4000, 4000]
    assert Plan(streams=3, drift_frames=256).untils == [256] * 3


def test_the_row_of_50_steps_says_what_it_stands_for() -> None:
    with_teacher, without = page(findings(), TOLD, "student"), page(replace(findings(), teacher=None), TOLD, "student")
    assert "a chunk of 50 takes 400 ms, 10.0 times that of 4" in with_teacher
    assert "The row of 50 is the same weights" in without


def test_a_quick_look_measures_less_of_everything() -> None:
    plan = Plan()
    assert QUICK.clips < plan.clips
    assert QUICK.switches < plan.switches
    assert sum(QUICK.untils) < sum(plan.untils) / 50
    assert QUICK.sheet < plan.sheet
    assert Plan(clips=4).sheet == 24


@pytest.fixture
def wanted(tiny_model: Path, tmp_path: Path) -> Wanted:
    torch.manual_seed(0)
    save_probe(Probe(), tmp_path / "probe.safetensors", "not trained at all")
    return Wanted(
        model=tiny_model,
        teacher=None,
        probe=tmp_path / "probe.safetensors",
        probe_folder=tmp_path / "probe",
        probe_budget_s=1.0,
        out=tmp_path / "page.md",
        threads=1,
        words=("--model", "a folder"),
    )


def test_a_run_measures_every_part_and_ends_with_one_line(
    wanted: Wanted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "teacher").mkdir()
    torch.save({"name": "teacher", "ema": Denoiser(TINY).state_dict()}, tmp_path / "teacher" / "checkpoint.pt")
    evaluate(replace(wanted, teacher=tmp_path / "teacher"), SMALLEST)
    printed = capsys.readouterr()
    report = json.loads(printed.out.splitlines()[-1])
    assert tuple(report) == KEYS
    assert {key for key, value in report.items() if value is None} <= {
        "background_noise",
        "motion_error",
        "still_share",
    }
    assert [row["steps"] for row in report["steps"]] == list(STEP_COUNTS)
    assert all(row["ms"] > 0 for row in report["steps"])
    assert [point["quality"] is None for point in report["drift"]] == [False, True, True, True, True]
    text = (tmp_path / "page.md").read_text()
    pictures = {path.name for path in (tmp_path / "page").iterdir()}
    assert {name for name in pictures if f"(page/{name})" in text} == pictures
    assert len(pictures) == 7
    assert "`stillstream eval --model 'a folder'`" in text
    assert "guidance 2" in text
    assert "4 clips a row, 1 long streams (1 to frame 0)" in text
    assert "longer --probe-budget" in printed.err
    assert {path.name for path in tmp_path.iterdir()} == {"page", "page.md", "probe.safetensors", "teacher"}


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_without_a_probe_one_is_trained_and_kept(
    wanted: Wanted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from app.evaluate import ready_probe
    from pipeline.engine import Engine

    ticking = count()
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: float(next(ticking))))
    trained, said = ready_probe(replace(wanted, probe=None), Engine.load(wanted.model, threads=1))
    assert "trained on renders for 1 s" in said
    kept = load_probe(tmp_path / "probe" / "probe.safetensors")
    assert torch.equal(kept.spot.weight.half(), trained.spot.weight.half())
    saved = (tmp_path / "probe" / "checkpoint.pt").read_bytes()
    ready_probe(replace(wanted, probe=None), Engine.load(wanted.model, threads=1))
    assert (tmp_path / "probe" / "checkpoint.pt").read_bytes() == saved


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"model": Path("no/model")}, "config_missing"),
        ({"teacher": Path("no/teacher")}, "teacher_unreadable"),
        ({"probe": Path("no/probe")}, "probe_unreadable"),
        ({"probe": ROOT / "README.md"}, "probe_unreadable"),
        ({"probe": ROOT / "pipeline" / "pocket" / "text.safetensors"}, "probe_unreadable"),
    ],
)
def test_a_wrong_input_is_one_sentence_before_anything_is_measured(
    wanted: Wanted, tmp_path: Path, change: dict[str, Path], code: str
) -> None:
    with pytest.raises((AppError, PipelineError)) as refused:
        evaluate(replace(wanted, **change), SMALLEST)  # type: ignore[arg-type]
    assert refused.value.code == code
    assert str(next(iter(change.values()))) in refused.value.message
    assert not wanted.out.exists()


@pytest.mark.parametrize("out", ["no/page.md", "page.txt", "folder.md", "taken.md", "file/page.md"])
def test_a_page_that_cannot_be_written_is_told_before_anything_is_measured(tmp_path: Path, out: str) -> None:
    (tmp_path / "folder.md").mkdir()
    (tmp_path / "taken").write_text("where the pictures would go")
    (tmp_path / "file").write_text("no folder")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(AppError) as refused:
        prepare(tmp_path / out)
    assert refused.value.code == "out_unwritable"
    assert sorted(tmp_path.rglob("*")) == before


def test_on_the_command_line_a_mistake_is_one_line(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "app", "eval", "--out", str(tmp_path / "no" / "page.md")],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("out_unwritable: ")
    assert len(ended.stderr.splitlines()) == 1
