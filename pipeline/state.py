"""All that one stream remembers. Allocated once by `Engine.open`, reset in place; holds no weights."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.codec import Memory
from pipeline.kv_cache import KVCache
from pipeline.noise_controller import NoiseController
from pipeline.region_cache import RegionCache
from pipeline.student import TextKV
from pipeline.tiles import Tiles
from pipeline.wording import PastLatents, Wording


@dataclass
class StreamState:
    """index: the next chunk. prompt, text: the prompt that is drawn, and the cross-attention keys and values of what it
    is drawn from. wording: how it came there. drawn_HW: the version of it that each latent cell was drawn from last.
    past: clean latents of what the cache remembers; None: nobody will want it rewritten. worn: the low-rank weights
    that the words' keys were made with. source: which one the encoder remembers. noise: how much less of it that source
    gets now. regions: None for a model that cannot hold tiles.
    """

    cache: KVCache
    encoder: Memory
    decoder: Memory
    seed: int
    index: int = 0
    prompt: str | None = None
    text: TextKV | None = None
    wording: Wording = field(default_factory=Wording)
    drawn_HW: Tensor = field(default_factory=lambda: torch.zeros(1, 1, dtype=torch.int64))
    past: PastLatents | None = None
    worn: tuple[str, float] = ("", 0.0)
    source: int = 0
    noise: NoiseController = field(default_factory=NoiseController)
    regions: RegionCache | None = None

    def reset(self, seed: int) -> None:
        self.cache.reset()
        if self.regions is not None:
            self.regions.reset()
        self.encoder.reset()
        self.decoder.reset()
        self.noise.reset()
        self.seed, self.index, self.source = seed, 0, 0
        self.prompt, self.text = None, None
        self.wording.reset()

    def drawn(self, tiles: Tiles | None) -> None:
        """The chunk is drawn, or only these tiles of it."""
        if tiles is None:
            self.drawn_HW.fill_(self.wording.version)
        else:
            tiles.scatter(tiles.gather(self.drawn_HW).fill_(self.wording.version), self.drawn_HW)


def last_before(state: StreamState) -> tuple[Tensor | None, Tensor | None]:
    """The latent frame before the coming chunk, for a gate to let through, (1, 1, C, h, w), and where it may.

    None, None at a stream's beginning, and where the words are other ones, or read by other low-rank weights: that
    frame shows what those before told. A mask, booleans (h, w), where only some cells were drawn from these already;
    None: all were.
    """
    same_HW = state.drawn_HW == state.wording.version
    newest = None if state.past is None else state.past.newest()
    if newest is None or not same_HW.any():
        return None, None
    return newest[None, None], None if same_HW.all() else same_HW
