"""All that one stream remembers. Allocated once by `Engine.open`, reset in place; holds no weights."""

from dataclasses import dataclass, field

from torch import Tensor

from pipeline.codec import Memory
from pipeline.kv_cache import KVCache
from pipeline.region_cache import RegionCache
from pipeline.student import TextKV
from pipeline.wording import PastLatents, Wording


@dataclass
class StreamState:
    """index: the next chunk. prompt, text: the prompt that is drawn, and the cross-attention keys and values of what it
    is drawn from. wording: how it came there. past: clean latents of what the cache remembers; None: nobody will want
    it rewritten. worn: the low-rank weights that the words' keys were made with. regions: None for a model that cannot
    hold tiles.
    """

    cache: KVCache
    encoder: Memory
    decoder: Memory
    seed: int
    index: int = 0
    prompt: str | None = None
    text: TextKV | None = None
    wording: Wording = field(default_factory=Wording)
    past: PastLatents | None = None
    worn: tuple[str, float] = ("", 0.0)
    regions: RegionCache | None = None

    def reset(self, seed: int) -> None:
        self.cache.reset()
        if self.regions is not None:
            self.regions.reset()
        self.encoder.reset()
        self.decoder.reset()
        self.seed, self.index = seed, 0
        self.prompt, self.text = None, None
        self.wording.reset()


def last_before(state: StreamState) -> Tensor | None:
    """The latent frame before the coming chunk, for a gate to let through, (C, h, w); None at a stream's beginning.

    None, too, where the words are new: that frame shows what the ones before told.
    """
    same = state.wording.drawn == state.wording.version
    return state.past.newest() if state.past is not None and same else None
