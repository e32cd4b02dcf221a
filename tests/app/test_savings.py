"""Dense times against sparse ones: of one kind of chunk, and nothing before both are known."""

from dataclasses import replace

import numpy as np
import pytest

from app.savings import FEWEST, Savings
from pipeline.chunk import Chunk, Controls

TEXT = Controls("ball", regions=0.5)


def take(
    savings: Savings, chunk_ms: list[float], *, dense: bool, controls: Controls = TEXT, followed: bool = False
) -> None:
    mask = None if dense else np.array([[True, False]])
    for each_ms in chunk_ms:
        chunk = Chunk(0, 0, np.zeros((1, 32, 64, 3), np.uint8), np.zeros((1, 1, 2, 4), np.float32), active_HW=mask)
        savings.took(controls, followed, chunk, each_ms)


def test_the_medians_are_compared_once_there_are_a_few_of_both() -> None:
    savings = Savings()
    take(savings, [100.0, 900.0, 100.0], dense=True)
    take(savings, [75.0] * (FEWEST - 1), dense=False)
    assert savings.share is None
    take(savings, [75.0], dense=False)
    assert savings.share == 0.25


def test_sparse_chunks_that_take_longer_are_told_as_a_loss() -> None:
    savings = Savings()
    take(savings, [100.0] * 3, dense=True)
    take(savings, [110.0] * 3, dense=False)
    assert savings.share == pytest.approx(-0.1)


def test_only_the_newest_sparse_chunks_count() -> None:
    savings = Savings()
    take(savings, [100.0] * 3, dense=True)
    take(savings, [90.0] * 100, dense=False)
    take(savings, [50.0] * 16, dense=False)
    assert savings.share == 0.5


@pytest.mark.parametrize(
    ("controls", "followed"),
    [(TEXT, True), (replace(TEXT, steps=2), False), (replace(TEXT, lora="ink"), False)],
    ids=["a source", "other passes", "low-rank weights"],
)
def test_a_chunk_of_another_kind_is_not_compared_with_what_was_before(controls: Controls, followed: bool) -> None:
    savings = Savings()
    take(savings, [100.0] * 3, dense=True)
    take(savings, [50.0] * 3, dense=False, controls=controls, followed=followed)
    assert savings.share is None


def test_the_strength_counts_where_there_is_a_source_and_else_not() -> None:
    stronger = replace(TEXT, strength=0.9)
    for followed, share in ((False, 0.5), (True, None)):
        savings = Savings()
        take(savings, [100.0] * 3, dense=True, followed=followed)
        take(savings, [50.0] * 3, dense=False, controls=stronger, followed=followed)
        assert savings.share == share
