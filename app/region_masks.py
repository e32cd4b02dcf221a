"""The motion mask alone over drawn scenes: how much of what a person could see change it names, and how much besides.

What a mask names counts as computed at once, and nothing is computed for its age. Knows no student and no engine.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch

from app import region_figures as figures
from pipeline.codec import pixels_to_frames
from pipeline.motion import Sensitivity, SourceMotion
from pipeline.plan import SETTLE


@dataclass
class Followed:
    """masks: for each chunk from SETTLE on, the tiles that truly changed and those that were named. dense: the chunks
    of these, counted from a stream's first, of which nothing was to be held."""

    masks: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    dense: list[int] = field(default_factory=list)

    @property
    def recall_and_precision(self) -> tuple[float | None, float | None]:
        return figures.recall_and_precision(self.masks)

    @property
    def active_fraction(self) -> float:
        return float(np.mean([said.mean() for _, said in self.masks]))


def follow(chunks: Iterable[tuple[np.ndarray, np.ndarray]], dial: float, per_latent: int = 4) -> Followed:
    """chunks: (true pictures, seen pictures) of a scene from its beginning, uint8 (T, H, W, 3) each."""
    sensitivity, found = Sensitivity.of(dial), Followed()
    motion: SourceMotion | None = None
    for index, (true, seen) in enumerate(chunks):
        if motion is None:
            motion, stood_on = SourceMotion("cpu", *true.shape[1:3]), true[-1].copy()
        settled = index >= SETTLE
        mask = motion.look(pixels_to_frames(torch.from_numpy(seen)), per_latent, settled, sensitivity)
        motion.keep(mask)
        said = np.ones_like(motion.moving_HW) if mask is None else mask
        if settled:
            found.masks.append((figures.true_change(true, stood_on), said))
            found.dense += [index] if mask is None else []
        pixels = figures.over_pixels(said)
        stood_on[pixels] = true[-1][pixels]
    return found
