"""Who may look at whom: attention over a stream's past and a chunk's own tokens, and rotations that say where they are.

`CachedAttention` is the `attend` of inference; training has its own (`training/forcing.py`), regions theirs
(`region_cache.py`). Knows shapes and positions, and nothing of weights, schedules and codecs.
"""

import math
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.config import CacheConfig, StudentConfig
from pipeline.kv_cache import KVCache


class Attend(Protocol):
    """Self-attention of one layer; q, k, v are (B, N, heads, head dim), q and k not rotated yet."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


class Rotary(Protocol):
    """What is asked of a `Student`: rotations of tokens at given places."""

    config: StudentConfig

    def rope_rows(self, frames: list[int], grid: tuple[int, int], *, coarse: bool = False) -> Tensor: ...
    def coarse_grid(self, grid: tuple[int, int]) -> tuple[int, int]: ...


def rotate(x_BNHD: Tensor, rows: Tensor) -> Tensor:
    """Rotary embedding on interleaved pairs.

    rows: (2, N, 1, head dim / 2), cosines then sines; or `turns` of them, which are the quicker the more often used.
    """
    # In single precision: half would make neighbours of distant places.
    if torch.compiler.is_compiling():  # which makes one kernel of real numbers, and none of complex ones
        even, odd = x_BNHD.unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = rows
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x_BNHD.dtype)
    # Pairs as complex numbers turn in one product.
    pairs = torch.view_as_complex(x_BNHD.float().unflatten(-1, (-1, 2)))
    turned = torch.view_as_real(pairs * (rows if rows.is_complex() else turns(rows)))
    return turned.flatten(-2).to(x_BNHD.dtype)


def turns(rows: Tensor) -> Tensor:
    """Rotary rows as complex numbers, (N, 1, head dim / 2)."""
    return torch.complex(*rows)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """(B, N, heads, head dim) in and out; mask: (queries, keys), boolean, true = may look, or added to the scores."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if mask is None and torch.is_grad_enabled() and q.device.type == "cpu":
        # The CPU's fused attention has a backward several times slower than two plain products.
        weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).float().softmax(-1)
        return (weights.to(v.dtype) @ v).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def past_bias(config: CacheConfig, tokens: int, frames: int) -> Tensor | None:
    """What is added to the scores of remembered tokens, (frames * tokens,); None: nothing.

    Source: the attention bias of Krea Realtime (2025), against errors that the past hands on.
    """
    if config.past_weight == 1:
        return None
    bias = torch.full((frames, tokens), math.log(config.past_weight))
    bias[: max(1, config.sink)] = 0
    return bias.flatten()


def of_past(bias: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """A past's bias as a mask over its own keys and those that follow, (1, keys)."""
    return None if bias is None else F.pad(bias, (0, k.shape[1] - len(bias))).to(q)[None]


def roomy(x_BNHD: Tensor, more: int) -> Tensor:
    """A copy with room for so many tokens more."""
    made = x_BNHD.new_empty(x_BNHD.shape[0], x_BNHD.shape[1] + more, *x_BNHD.shape[2:])
    made[:, : x_BNHD.shape[1]] = x_BNHD
    return made


class CachedAttention:
    """One chunk against its stream's past. The past is rotated once and serves every pass of the chunk.

    While `writing`, each layer's keys and values go to the cache; the caller commits after the pass.
    place: the chunk is not a new one, but `chunk` remembered frames from this one on, which see those before them.
    coarse: the chunk is one of the cache's coarse past, through larger patches, and sees nothing else.
    While `anchored`, of the past only the sink is seen; a coarse past has none (`ModelConfig`).
    """

    def __init__(
        self,
        cache: KVCache,
        student: Rotary,
        grid: tuple[int, int],
        chunk: int,
        place: int | None = None,
        *,
        coarse: bool = False,
    ) -> None:
        if coarse:
            assert cache.coarse is not None, "a past without larger patches has no coarse part"
            cache, grid = cache.coarse, student.coarse_grid(grid)
        self.cache, self.writing, self.anchored, self.place = cache, False, False, place
        self.tokens = grid[0] * grid[1]
        self.frames = past = cache.frames if place is None else place
        far = 0 if cache.coarse is None else cache.coarse.frames
        numbers = cache.positions(chunk if place is None else 0, student.config.rope_max_seq_len)
        rows = turns(student.rope_rows(numbers[far : far + past + chunk], grid, coarse=coarse))
        self.past_rows, self.rows = rows[: past * self.tokens], rows[past * self.tokens :]
        if far:
            before = turns(student.rope_rows(numbers[:far], student.coarse_grid(grid), coarse=True))
            self.past_rows = torch.cat((before, self.past_rows))
        self._rooms: dict[int, tuple[Tensor, Tensor]] = {}  # a layer's past, and room for what a pass adds
        # A rotated copy of the past would double what a large model needs, and a GPU rotates in no time.
        self._keeps = cache.keys.device.type == "cpu"
        bias = past_bias(cache.config, self.tokens, past)
        self.bias = None if bias is None else bias.to(cache.keys)
        self.sink = min(cache.config.sink, past) * self.tokens  # so many of the past's tokens

    def past(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys, rotated, and values of what is remembered."""
        if not self._keeps:
            return self.read(layer)
        keys, values = self._room(layer)
        end = keys.shape[1] - len(self.rows)
        return keys[:, :end], values[:, :end]

    def _room(self, layer: int) -> tuple[Tensor, Tensor]:
        if layer not in self._rooms:
            past_k, past_v = self.read(layer)
            self._rooms[layer] = roomy(past_k, len(self.rows)), roomy(past_v, len(self.rows))
        return self._rooms[layer]

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        keys, values = (held.flatten(1, 2) for held in self.cache.read(layer, self.frames))
        if self.cache.coarse is not None:
            far_k, far_v = (held.flatten(1, 2) for held in self.cache.coarse.read(layer))
            keys, values = torch.cat((far_k, keys), 1), torch.cat((far_v, values), 1)
        return rotate(keys, self.past_rows), values

    def after_past(self, layer: int, own_k: Tensor, own_v: Tensor) -> tuple[Tensor, Tensor]:
        """The past and then these, valid until the next call for the layer: the past is not copied for every pass."""
        if self.anchored:
            past_k, past_v = (part[:, : self.sink] for part in self.past(layer))
            return torch.cat((past_k, own_k), 1), torch.cat((past_v, own_v), 1)
        if not self._keeps or torch.is_grad_enabled():  # a backward still wants what the pass before saw
            past_k, past_v = self.past(layer)
            return torch.cat((past_k, own_k), 1), torch.cat((past_v, own_v), 1)
        (keys, values), count, missing = self._room(layer), own_k.shape[1], len(self.rows) - own_k.shape[1]
        if missing:
            keys, values = keys[:, :-missing], values[:, :-missing]
        keys[:, -count:].copy_(own_k)
        values[:, -count:].copy_(own_v)
        return keys, values

    def look(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = self.bias[: self.sink] if self.anchored and self.bias is not None else self.bias
        return attention(q, k, v, of_past(bias, q, k))

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = self.look(rotate(q, self.rows), *self.after_past(layer, rotate(k, self.rows), v))
        if self.writing:
            own_k, own_v = (x.unflatten(1, (-1, self.tokens)) for x in (k, v))
            self.cache.write(layer, own_k, own_v, self.place)
        return out
