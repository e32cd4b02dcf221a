"""How a mask becomes the tiles that are computed."""

import numpy as np
import pytest

from pipeline.plan import SIZES, filled


def mask(count: int, total: int = 60) -> np.ndarray:
    made = np.zeros(total, bool)
    made[:count] = True
    return made.reshape(6, -1)


@pytest.mark.parametrize("count", range(0, 43))
def test_a_mask_is_filled_up_to_one_of_few_sizes(count: int) -> None:
    full = filled(mask(count), np.ones((6, 10), int), 99)
    assert full is not None
    assert full[mask(count)].all()
    assert full.sum() in {round(60 * share) for share in SIZES}
    assert full.sum() >= max(count, 3)


def test_the_slack_goes_to_the_oldest() -> None:
    age = np.arange(60).reshape(6, 10)
    full = filled(mask(1), age, 99)
    assert full is not None
    assert np.flatnonzero(full).tolist() == [0, 58, 59]


def test_what_is_too_old_is_computed_whatever_moves() -> None:
    age = np.zeros((6, 10), int)
    age[5] = 30
    full = filled(mask(2), age, 30)
    assert full is not None
    assert full[5].all()


def test_above_the_break_even_all_is_computed() -> None:
    assert filled(mask(43), np.zeros((6, 10), int), 99) is None
    assert filled(mask(60), np.zeros((6, 10), int), 99) is None
