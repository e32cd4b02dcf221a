"""What was computed can be told from what was held."""

import numpy as np

from app.tint import TINT, tinted
from pipeline.chunk import Chunk


def test_what_was_computed_is_tinted() -> None:
    mask = np.array([[0, 1], [0, 0]], bool)
    frames, latents = np.full((2, 64, 64, 3), 90, np.uint8), np.zeros((1, 1, 1, 1), np.float32)
    pictures = tinted(Chunk(0, 0, frames, latents, active_HW=mask))
    assert pictures.shape == frames.shape
    picture = pictures[0]
    assert np.array_equal(picture, pictures[1])
    assert np.array_equal(picture[0, 32], (60 + TINT / 3).round())
    assert (picture[:, :32] == 90).all()
    assert np.array_equal(tinted(Chunk(0, 0, frames, latents))[1, 63, 0], picture[0, 32])
