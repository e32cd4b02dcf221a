"""What sessions say of a chunk."""

import numpy as np
import pytest

from app.house import told_tiles
from pipeline.chunk import Chunk


@pytest.mark.parametrize(
    ("mask", "cells", "fraction"),
    [(None, "", 1.0), ([[0, 1, 1], [0, 0, 0]], "011000", 0.333), ([[1, 0, 0], [0, 1, 0]], "100010", 0.333)],
)
def test_computed_tiles_are_told_row_by_row(mask: list[list[int]] | None, cells: str, fraction: float) -> None:
    frames, latents = np.zeros((4, 64, 96, 3), np.uint8), np.zeros((1, 1, 4, 6), np.float32)
    chunk = Chunk(0, 0, frames, latents, active_HW=None if mask is None else np.array(mask, bool))

    assert told_tiles(chunk) == {"active": cells, "active_fraction": fraction}
