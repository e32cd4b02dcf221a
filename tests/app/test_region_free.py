"""A free run tells how far a sparse stream falls behind the dense one, and how far that may be chance."""

import numpy as np
import pytest
import torch

from app.bench_regions import READ
from app.region_free import free_run, gaps, jackknife_error, with_errors
from app.region_run import GAPS
from pipeline.engine import Engine
from pipeline.training import asks
from pipeline.training.evaluate import Drawn
from pipeline.training.probe import Answers, Probe
from tests.app.tiny import regions_engine


@pytest.fixture(scope="module")
def engine() -> Engine:
    made: Engine = regions_engine()
    return made


@pytest.mark.parametrize("follows", [False, True], ids=["text", "webcam"])
def test_a_free_run_is_read_by_the_probe(engine: Engine, follows: bool) -> None:
    torch.manual_seed(1)
    found = free_run(engine, Probe().eval(), 0.5, 8, follows, 2)
    assert set(found) == set(READ)
    assert all(value is not None and np.isfinite(value) for value in found.values())


def test_a_dial_that_is_off_leaves_no_gap(engine: Engine) -> None:
    torch.manual_seed(1)
    found = free_run(engine, Probe().eval(), 0.0, 8, False, 2)
    assert found["probe_gap"] == found["motion_gap"] == 0
    assert found["fd_ratio"] == 1
    assert [found[f"{name}_error"] for name in GAPS] == [0, 0, 0]


def test_an_error_over_streams_is_that_of_their_mean() -> None:
    values = np.array([0.1, 0.4, 0.3, 0.8])
    left = [float(np.delete(values, out).mean()) for out in range(4)]
    assert jackknife_error([*left]) == pytest.approx(values.std(ddof=1) / 2)
    assert jackknife_error([0.1]) is None
    assert jackknife_error([0.1, None]) is None


def test_what_one_stream_alone_gets_wrong_is_its_gap_and_the_spread_says_so() -> None:
    asked = asks.asks(asks.DRIFT_SEED, 3)
    words = [ask.words for ask in asked for _ in range(2)]
    features = np.random.default_rng(0).normal(size=(6, 128))
    clips, centres = torch.zeros(6, 1), np.zeros((6, 8, 2))
    dense = Drawn(clips, Answers(words, centres, features), [])
    wrong = [dict.fromkeys(said, "wrong") if place in (2, 3) else said for place, said in enumerate(words)]
    sparse = Drawn(clips, Answers(wrong, centres, features), [])
    assert gaps(asked, dense, sparse, dense, [0, 2])["probe_gap"] == 0
    assert gaps(asked, dense, sparse, dense, [1])["probe_gap"] == 1
    found = with_errors(asked, dense, sparse, dense)
    assert found["probe_gap"] == pytest.approx(1 / 3, abs=0.05)
    assert found["probe_gap_error"] == pytest.approx(1 / 3, abs=0.05)
    one = with_errors(asked[:1], *(Drawn(clips[:2], Answers(words[:2], centres[:2], features[:2]), []),) * 3)
    assert (one["probe_gap"], one["probe_gap_error"]) == (0, None)
