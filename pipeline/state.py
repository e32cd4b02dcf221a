"""All that one stream remembers. Allocated once by `Engine.open`, reset in place; holds no weights."""

from dataclasses import dataclass

from pipeline.codec import CodecMemory
from pipeline.kv_cache import KVCache
from pipeline.region_cache import RegionCache
from pipeline.student import TextKV


@dataclass
class StreamState:
    """index: the next chunk. prompt, text: the prompt that the cross-attention keys in `text` belong to.

    regions: None for a model that cannot hold tiles.
    """

    cache: KVCache
    encoder: CodecMemory
    decoder: CodecMemory
    seed: int
    index: int = 0
    prompt: str | None = None
    text: TextKV | None = None
    regions: RegionCache | None = None

    def reset(self, seed: int) -> None:
        self.cache.reset()
        if self.regions is not None:
            self.regions.reset()
        self.encoder.reset()
        self.decoder.reset()
        self.seed, self.index = seed, 0
        self.prompt, self.text = None, None
