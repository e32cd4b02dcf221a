"""How much less noise a source gets where it moves fast, so that the picture keeps to it there; smoothed over chunks.

What is smoothed is how much less, not the strength itself: a strength that the viewer changes holds at once, and none
is ever exceeded. Source: the motion-aware noise controller of StreamDiffusionV2 (Feng et al. 2025). Theirs smooths the
noise scale itself, which is the same while nobody changes the strength. It differs in that it tells the model a
timestep 100 below the noise that was mixed in, and leaves a stream's first chunk out.
Knows no schedule, no tiles and no controls.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

FAST = 0.2  # difference of pictures, of 2, that counts as full motion
MOST_LESS = 0.1  # of the noise level, 0 to 1
NEWEST = 0.9  # weight of this chunk beside what was before


@dataclass
class NoiseController:
    """What one source has shown. less: how far below the strength that is asked for its chunk begins, 0 to MOST_LESS.

    last_CHW: the source's newest picture; None: none has come yet.
    """

    less: float = 0.0
    last_CHW: Tensor | None = None

    def reset(self) -> None:
        self.less, self.last_CHW = 0.0, None

    def see(self, frames_TCHW: Tensor) -> float:
        """Take the pictures of a chunk, -1 to 1; returns `less`. The step from the chunk before counts as well."""
        before = frames_TCHW[:1] if self.last_CHW is None else self.last_CHW[None]
        self.less = NEWEST * MOST_LESS * motion(torch.cat((before, frames_TCHW))) + (1 - NEWEST) * self.less
        self.last_CHW = frames_TCHW[-1].clone()
        return self.less


def motion(frames_TCHW: Tensor) -> float:
    """How fast pictures from -1 to 1 move, 0 to 1: the root mean square of the largest step from one to the next.

    A number of the host, as the schedule is: read at a chunk's beginning, when the device has nothing else to do.
    """
    step = frames_TCHW[1:] - frames_TCHW[:-1]
    return min(1.0, float(step.square().mean((1, 2, 3)).max().sqrt()) / FAST)
