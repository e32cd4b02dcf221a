"""Bytes of encoded pictures: what stands costs next to nothing, what moves costs most."""

import numpy as np

from app.region_bytes import Encoder


def test_held_pixels_cost_an_encoder_nothing() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (16, 96, 160, 3)).astype(np.uint8)
    held, partly = noise.copy(), noise.copy()
    held[8:] = held[7]
    partly[8:, :, 32:] = partly[7, :, 32:]  # a fifth of the picture goes on
    found = []
    for frames in (noise, partly, held):
        encoder = Encoder(160, 96, 16)
        first = encoder.push(frames[:8])
        assert first > 10_000
        found.append(encoder.push(frames[8:]))
    moving, fifth, still = found
    assert still < moving / 50
    assert moving / 8 < fifth < moving / 3
