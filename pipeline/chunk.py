"""The two plain values that cross the generator's border: Controls go in, a Chunk comes out.

Both pickle, hold numpy and Python scalars only, and know nothing of torch, processes or the wire.
"""

from dataclasses import dataclass

import numpy as np

from pipeline.config import Transition


@dataclass(frozen=True)
class Controls:
    """What to draw: a snapshot read once per chunk.

    prompt: what should be seen. seed: any integer in [0, 2**31). strength: how far the picture may leave the source; 0
    keeps the source, 1 ignores it. Unused without a source. structure: how closely the picture keeps to the source's
    outlines, 0 to 1. Unused without a source, and by a model that was not trained for it. regions: the dial of region
    caching, from 0 (off: all is computed) over quality to speed (1). A model that cannot hold tiles computes all.
    paint: "change only here": one "0" or "1" for each 32 x 32 tile, row by row; all else is held. "": no mask.
    transition: how a new prompt comes in: `cut` (from the next chunk on), `glide` (over `glide_chunks` chunks),
    `recache` (as a cut, and the remembered past is written again as if the stream had begun with it under the new
    prompt). steps: denoise passes of a chunk, 0 for the model's own; another number only where the model knows any.
    source: raised by the caller where another source begins, such as a camera that changes the size of its pictures;
    the regions begin anew with it. lora, lora_strength: the low-rank weights that are worn, by a name of
    `ModelConfig.loras`, and how strongly. motion_aware: whether a source that moves fast gets up to 0.1 less than the
    strength; None: as the model has it. Unused without a source. paused: the caller stops asking for chunks; the
    generator itself never reads it. epoch: raised by the caller at each change that makes undelivered frames stale;
    copied into the Chunk.
    """

    prompt: str
    seed: int = 7
    strength: float = 0.6
    structure: float = 0.0
    regions: float = 0.0
    paint: str = ""
    transition: Transition = "cut"
    glide_chunks: int = 4
    steps: int = 0
    source: int = 0
    lora: str = ""
    lora_strength: float = 1.0
    motion_aware: bool | None = None
    paused: bool = False
    epoch: int = 0


@dataclass(frozen=True)
class Chunk:
    """One chunk of video.

    index: position in the stream, from 0. epoch: copied from the Controls that made it.
    frames_THWC: uint8 RGB. latents_TCHW: float32, the clean latents that the frames were decoded from.
    prompt: what it was drawn from; while a new one is still being read, the one before.
    active_HW: the tiles that were computed, the others were held; None: all of them. refreshed_HW: those that were
    computed for their age alone.
    """

    index: int
    epoch: int
    frames_THWC: np.ndarray
    latents_TCHW: np.ndarray
    active_HW: np.ndarray | None = None
    refreshed_HW: np.ndarray | None = None
    prompt: str = ""
