"""Keys and values of past latent frames: the first `sink` frames of the stream and a ring of the newest `window`.

Keys are stored before rotation. A frame's position is its place in the remembered past (sink first, then the window by
age), so positions never grow and a stream has no end; or, for models that were trained so, its place in the stream,
until the table of rotations ends: from then on the sink's distance stays. All memory is allocated once. A denoise pass
only reads; the cache pass writes layer by layer and then commits. A token that was held over a chunk stands there with
the keys and values of its newest computed frame, once for each latent frame of that chunk. Of models that were trained
so, the sink moves: what leaves the window is averaged into it; or the window is followed backwards by a coarse past, of
fewer tokens a frame, which has a cache of its own. Knows nothing of the transformer's layers beyond their number.
"""

from math import prod

import torch
from torch import Tensor

from pipeline.config import CacheConfig, ModelConfig


def ring_slot(frame: int, sink: int, window: int) -> int:
    """Where a frame of the stream is kept, if it is."""
    return frame if frame < sink else sink + (frame - sink) % window


class KVCache:
    """keys, values: (layers, batch, slots, tokens per frame, heads, head dim). First the `sink` slots, then a ring.

    batch: streams that go in step, as a training rollout has them; a live stream is alone. coarse: the cache of the
    frames that left the window; whoever sees them leave writes them there.
    """

    def __init__(
        self,
        config: CacheConfig,
        layers: int,
        tokens: int,
        heads: int,
        head_dim: int,
        *,
        batch: int = 1,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        coarse: "KVCache | None" = None,
    ) -> None:
        self.config, self.coarse = config, coarse
        shape = (layers, batch, config.sink + config.window, tokens, heads, head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.written = 0
        self._left = [config.sink] * layers  # the first frame whose leave the sink of a layer has not taken in yet

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        *,
        batch: int = 1,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "KVCache":
        """An empty one of a model's sizes."""
        shape, tokens = config.student, config.tokens_per_frame
        heads, head_dim = shape.num_attention_heads, shape.attention_head_dim

        def made(rule: CacheConfig, tokens: int, coarse: KVCache | None = None) -> KVCache:
            sizes = (shape.num_layers, tokens, heads, head_dim)
            return cls(rule, *sizes, batch=batch, device=device, dtype=dtype, coarse=coarse)

        if not config.cache.coarse:
            return made(config.cache, tokens)
        far = CacheConfig(sink=0, window=config.cache.coarse, positions=config.cache.positions)
        return made(config.cache, tokens, made(far, tokens // prod(shape.coarser)))

    def reset(self) -> None:
        self.written = 0
        self._left = [self.config.sink] * len(self._left)
        if self.coarse is not None:
            self.coarse.reset()

    @property
    def frames(self) -> int:
        """Latent frames remembered now, but for the coarse ones."""
        return min(self.written, self.config.sink + self.config.window)

    def slot(self, frame: int) -> int:
        """Where a frame of the stream is kept, if it is."""
        return ring_slot(frame, self.config.sink, self.config.window)

    def numbers(self) -> list[int]:
        """Which frames of the stream are remembered, oldest first."""
        sink = min(self.written, self.config.sink)
        oldest = max(sink, self.written - self.config.window)
        return [*range(sink), *range(oldest, self.written)]

    def slots(self) -> list[int]:
        """Slots of the remembered frames in the order of their positions."""
        return [self.slot(frame) for frame in self.numbers()]

    def positions(self, coming: int, limit: int) -> list[int]:
        """Of the remembered frames, the coarse ones first, and of so many that follow, each below `limit`."""
        far = [] if self.coarse is None else self.coarse.numbers()
        if self.config.positions == "window":
            return list(range(len(far) + self.frames + coming))
        numbers = [*far, *self.numbers(), *range(self.written, self.written + coming)]
        over = max(0, self.written + coming - limit)
        return [number if number < self.config.sink else number - over for number in numbers]

    def read(self, layer: int, count: int | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values of the past in position order, (batch, frames, tokens, heads, head dim) each.

        count: of the oldest so many; None: of all.
        """
        slots = torch.tensor(self.slots()[:count], dtype=torch.int64, device=self.keys.device)
        return self.keys[layer].index_select(1, slots), self.values[layer].index_select(1, slots)

    def newest(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the newest committed frame, (batch, tokens, heads, head dim) each."""
        slot = self.slot(self.written - 1)
        return self.keys[layer, :, slot], self.values[layer, :, slot]

    def write(self, layer: int, keys_BTNHD: Tensor, values_BTNHD: Tensor, place: int | None = None) -> None:
        """Store the coming frames of one layer. Only the newest `window` of them can stay.

        place: instead, write over the remembered frames from this one on, in the order of their positions.
        """
        slots = None if place is None else self.slots()[place:]
        for offset in range(keys_BTNHD.shape[1]):
            slot = self.slot(self.written + offset) if slots is None else slots[offset]
            if slots is None:
                self._average(layer, self.written + offset - self.config.window)
            self.keys[layer, :, slot] = keys_BTNHD[:, offset]
            self.values[layer, :, slot] = values_BTNHD[:, offset]

    def _average(self, layer: int, leaving: int) -> None:
        """Take the frame that is about to be written over into the sink, once. Each sink frame takes every `sink`-th.

        Source: the EMA sink of Reward-Forcing (2025), which averages keys before rotation as well.
        """
        sink, gives = self.config.sink, 1 - self.config.sink_keeps
        if not sink or not gives or leaving < self._left[layer]:
            return
        self._left[layer] = leaving + 1
        for store in (self.keys, self.values):
            store[layer, :, leaving % sink].lerp_(store[layer, :, self.slot(leaving)], gives)

    def commit(self, frames: int) -> None:
        """Count the frames that every layer has written."""
        self.written += frames
