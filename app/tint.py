"""The computed tiles of a chunk, tinted for a person to see. Knows no file."""

import numpy as np

from app.region_figures import over_pixels
from pipeline.chunk import Chunk

TINT = np.array([56, 182, 255], np.float32)


def tinted(chunk: Chunk) -> np.ndarray:
    """The pictures (T, H, W, 3), uint8, a third of the tint over what was computed."""
    every_HW = np.ones(chunk.frames_THWC.shape[1:3], bool)
    area_HW = every_HW if chunk.active_HW is None else over_pixels(chunk.active_HW)
    mixed = np.where(area_HW[..., None], chunk.frames_THWC * (2 / 3) + TINT / 3, chunk.frames_THWC)
    made: np.ndarray = mixed.round().astype(np.uint8)
    return made
