"""Ten minutes of one live stream, watched by a viewer in a process of its own: nothing grows, nothing fades."""

from collections.abc import Sequence

import numpy as np
import pytest

from app.bench_live import Memory, Watched, follow, serving
from app.bench_viewer import Plan, Sight
from app.worker import default_threads

pytestmark = pytest.mark.soak

MINUTES = 10
SAMPLE_S = 1.0
GROWTH_MB = 20.0  # about a hundred frames, of the 9600 that pass through
BUFFER_FRAMES = 16
MOVED_LEVELS = 8


@pytest.fixture(scope="module")
def watched() -> Watched:
    with serving(None, default_threads()) as server:
        return follow(server, Plan(sessions=0, calm_s=MINUTES * 60, prompt_changes=0), SAMPLE_S)


def by_minute(sights: Sequence[Sight]) -> list[np.ndarray]:
    """The pictures of each whole minute, THWC."""
    start_s = sights[0].seen_s
    minutes: list[list[np.ndarray]] = [[] for _ in range(MINUTES)]
    for sight in sights:
        minute = int((sight.seen_s - start_s) // 60)
        if minute < MINUTES:
            minutes[minute].append(sight.small_HWC)
    return [np.stack(pictures).astype(np.float32) for pictures in minutes]


@pytest.mark.parametrize("of", ["server_mb", "worker_mb", "all_mb"])
def test_memory_does_not_grow_once_the_stream_is_warm(watched: Watched, of: str) -> None:
    minute = round(60 / SAMPLE_S)
    middle = watched.memory[2 * minute : 3 * minute]
    last = watched.memory[-2 * minute : -minute]

    def mean_mb(samples: list[Memory]) -> float:
        return float(np.mean([getattr(sample, of) for sample in samples]))

    assert mean_mb(last) - mean_mb(middle) < GROWTH_MB


def test_the_queue_stays_bounded_and_loses_nothing(watched: Watched) -> None:
    stats = watched.seen.stats

    assert max(said["queue_frames"] for said in stats) <= BUFFER_FRAMES
    assert stats[-1]["dropped_frames"] == stats[0]["dropped_frames"]


def test_the_picture_keeps_moving(watched: Watched) -> None:
    for pictures_THWC in by_minute(watched.seen.sights):
        a_second_later = pictures_THWC[16:] - pictures_THWC[:-16]
        assert np.median(np.abs(a_second_later).max((1, 2, 3))) > MOVED_LEVELS


def test_colours_neither_fade_nor_burn_out(watched: Watched) -> None:
    minutes = by_minute(watched.seen.sights)
    contrast = [float(pictures.std((1, 2)).mean()) for pictures in minutes]
    saturation = [float((pictures.max(-1) - pictures.min(-1)).mean()) for pictures in minutes]
    brightness = [float(pictures.mean()) for pictures in minutes]

    for told in (contrast, saturation):
        assert min(told) > 0.5 * told[0]
        assert max(told) < 2.0 * told[0]
    assert max(brightness) - min(brightness) < 50
