"""The live half of the bench: a real server and a real viewer, each in its own process, on a tiny model."""

from pathlib import Path

import pytest

from app.bench_live import follow, serving, summarise
from app.bench_viewer import Plan
from app.errors import AppError
from tests.app.tiny import TINY, write_tiny_model


def test_a_viewer_of_a_real_server_gives_every_figure(tmp_path: Path) -> None:
    write_tiny_model(tmp_path)
    with serving(tmp_path, 1) as server:
        watched = follow(server, Plan(sessions=1, calm_s=2.5, prompt_changes=1), sample_s=0.5)
    report = summarise(watched, TINY.frames_per_chunk / TINY.fps)

    assert len(watched.seen.sights) > 20
    assert report["prompt_changes"] == 1
    for name in ("fps_viewer", "generation_share", "first_frame_ms_p50", "prompt_to_picture_ms_p50", "rss_mb"):
        assert report[name] is not None and report[name] > 0, name
    assert report["loop_lag_ms_p99"] is not None


def test_a_server_that_cannot_load_is_told_apart_from_a_slow_one(tmp_path: Path) -> None:
    with pytest.raises(AppError) as ended, serving(tmp_path / "nothing", 1):
        pass
    assert ended.value.code == "server_ended"
