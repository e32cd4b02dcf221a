"""The causal few-step student: our own explicit forward over the modules of diffusers' `WanTransformer3DModel`, or of
its `AnyFlowFARTransformer3DModel`, which has two more: patches for older frames, and an embedding of a pass's end.

The forward is one loop over layers; who may look at whom is decided by the `attend` object handed in: the stream's
KV cache at inference (`CachedAttention`), whole clips side by side in training (`training/forcing.py`). Sizes come from
the config, so a pocket student and a Wan checkpoint run through the same lines. Knows nothing of schedules and codecs.
"""

import inspect
import math
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from typing import Any, Protocol

import diffusers
import torch
from diffusers.utils import import_utils
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config import CacheConfig, StudentConfig
from pipeline.kv_cache import KVCache
from pipeline.tiles import Tiles

# diffusers imports an installed xformers without a guard, and one that does not fit the machine would end the program.
# Attention is ours, so nothing is lost.
import_utils._xformers_available = False
from diffusers import WanTransformer3DModel  # noqa: E402
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed  # noqa: E402

TextKV = Sequence[tuple[Tensor, Tensor]]
Modulations = tuple[Tensor, Tensor]


class Attend(Protocol):
    """Self-attention of one layer; q, k, v are (B, N, heads, head dim), q and k not rotated yet."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


def transformer(config: StudentConfig) -> Any:
    """diffusers' modules of this shape."""
    kind: Any = (
        WanTransformer3DModel if config.compressed_patch_size is None else diffusers.AnyFlowFARTransformer3DModel
    )
    known = inspect.signature(kind.__init__).parameters
    model = kind(**{name: value for name, value in asdict(config).items() if name in known})
    if config.compressed_patch_size is not None:
        # Tables as a Wan has them; the gate is in the config, and as a buffer nobody would give it back to `blank`.
        model.rope = WanRotaryPosEmbed(config.attention_head_dim, config.patch_size, config.rope_max_seq_len)
        del model.condition_embedder.delta_emb_gate
    return model


def between(waves: Tensor, size: int) -> Tensor:
    """Cosines and sines (2, places, pairs) of the places amid so many neighbours each."""
    if size == 1:
        return waves
    middle = waves[:, : waves.shape[1] // size * size].unflatten(1, (-1, size)).mean(2)
    return middle / middle.norm(dim=0)


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


# What bounds a small model's pass is the number of its operations: these three make few of what would be many.


def scaled(x_BND: Tensor, scale_BTD: Tensor, onto_BND: Tensor) -> Tensor:
    """Times the scale of the latent frame that each token belongs to, and added; T = 1 serves all frames."""
    frames = scale_BTD.shape[1]
    if frames == 1:
        return torch.addcmul(onto_BND, x_BND, scale_BTD)
    # The sum comes last: FSDP wants no view from a layer.
    return onto_BND + (x_BND.unflatten(1, (frames, -1)) * scale_BTD[:, :, None]).flatten(1, 2)


def modulated(norm: nn.LayerNorm, x_BND: Tensor, scale_BTD: Tensor, shift_BTD: Tensor) -> Tensor:
    """Normed, scaled and shifted, in single precision."""
    x_BND = x_BND.float()
    if scale_BTD.shape[:2] == (1, 1):  # the same for all tokens, as the gain and bias of a norm are
        return F.layer_norm(x_BND, norm.normalized_shape, scale_BTD.flatten(), shift_BTD.flatten(), norm.eps)
    grouped = norm(x_BND).unflatten(1, (scale_BTD.shape[1], -1))
    return torch.addcmul(shift_BTD[:, :, None], grouped, scale_BTD[:, :, None]).flatten(1, 2)


def rms_normed(norm: nn.RMSNorm, x_BND: Tensor) -> Tensor:
    """Torch's own is one kernel on a GPU and in compiled layers, and many small ones on a CPU."""
    if x_BND.device.type != "cpu" or torch.compiler.is_compiling():
        return norm(x_BND)
    assert norm.eps is not None, "the models' norms have an eps of their own"
    wide = x_BND.float()
    size = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    square = torch.addcmul(size.new_full((), norm.eps), size, size, value=1 / x_BND.shape[-1])
    return (wide * square.rsqrt()).to(x_BND.dtype) * norm.weight


@lru_cache(maxsize=8)
def positions(channels: int, height: int, width: int) -> Tensor:
    """Where each cell is: sines and cosines of y and x at channels / 4 frequencies, (channels, height, width)."""
    octaves = 2.0 ** torch.arange(channels // 4)
    parts = []
    for count, shape in ((height, (-1, 1)), (width, (1, -1))):
        place = (2 * torch.arange(count) + 1 - count) / count
        angles = torch.pi / 2 * octaves[:, None] * place
        parts += [wave.unflatten(1, shape).expand(-1, height, width) for wave in (angles.sin(), angles.cos())]
    return torch.cat(parts)


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
        student: "Student",
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


class Student(nn.Module):
    """Predicts the flow of noisy latents, (B, T, C, H, W) in and out."""

    def __init__(self, config: StudentConfig) -> None:
        super().__init__()
        self.config = config
        self.model = transformer(config)

    def coarse_grid(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Height and width of a latent frame in larger patches."""
        down, across = self.config.coarser
        return grid[0] // down, grid[1] // across

    def rope_rows(self, frames: list[int], grid: tuple[int, int], *, coarse: bool = False) -> Tensor:
        """Rotary rows of the tokens of frames at these positions: (2, frames * tokens, 1, head dim / 2).

        coarse: the tokens are larger patches, each amid those that it stands for.
        """
        rope, (height, width) = self.model.rope, grid
        waves = torch.stack((rope.freqs_cos[:, 0::2], rope.freqs_sin[:, 1::2]))
        t, h, w = waves.split([rope.t_dim // 2, rope.h_dim // 2, rope.w_dim // 2], 2)
        if coarse:
            down, across = self.config.coarser
            h, w = between(h, down), between(w, across)
        shape = (2, len(frames), height, width, -1)
        rows = (
            t[:, frames][:, :, None, None].expand(shape),
            h[:, None, :height, None].expand(shape),
            w[:, None, None, :width].expand(shape),
        )
        return torch.cat(rows, -1).flatten(1, 3)[:, :, None]

    def text_kv(self, text_BLD: Tensor) -> TextKV:
        """Cross-attention keys and values of every layer: computed once per prompt."""
        text = self.model.condition_embedder.text_embedder(text_BLD)
        return [self.layer_text(index, text) for index in range(len(self.model.blocks))]

    def layer_text(self, index: int, text_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """Those of one layer, from the embedded text."""
        attn, heads = self.model.blocks[index].attn2, (-1, self.config.attention_head_dim)
        return attn.norm_k(attn.to_k(text_BLD)).unflatten(2, heads), attn.to_v(text_BLD).unflatten(2, heads)

    def forward(
        self,
        latents_BTCHW: Tensor,
        timesteps_BT: Tensor,
        text: TextKV,
        attend: Attend,
        control_BTCHW: Tensor | None = None,
        tiles: Tiles | None = None,
        ends_BT: Tensor | None = None,
    ) -> Tensor:
        """Flow of each latent.

        timesteps_BT: one per latent frame, or T = 1 for all. text: its batch is B times a number of equal groups of
        frames, each group under its own prompt. control_BTCHW: structure to keep to, 0 to 1; none is the same as zeros.
        tiles: where the latents are columns of chosen tiles: which; `attend` must know them too. ends_BT: the timesteps
        where the pass is to end, for a student that puts out the mean flow on that way; None: where it begins.
        """
        return self.told(latents_BTCHW, self.time(timesteps_BT, ends_BT), text, attend, control_BTCHW, tiles)

    def told(
        self,
        latents_BTCHW: Tensor,
        modulations: Modulations,
        text: TextKV,
        attend: Attend,
        control_BTCHW: Tensor | None = None,
        tiles: Tiles | None = None,
    ) -> Tensor:
        """`forward`, with what `time` made of the timesteps."""
        tokens = self.embed(latents_BTCHW, control_BTCHW, tiles)
        modulation, head_modulation = modulations
        for layer in range(len(self.model.blocks)):
            tokens = self.layer(layer, tokens, modulation, text, attend)
        return self.head(tokens, head_modulation, latents_BTCHW)

    def write(self, clean_BTCHW: Tensor, text: TextKV, attend: CachedAttention, *, coarse: bool = False) -> None:
        """Have every layer's keys and values of clean latents written. coarse: they are seen through larger patches."""
        attend.writing = True
        tokens = self.embed(clean_BTCHW.to(self.dtype), coarse=coarse)
        modulation, _ = self.time(torch.zeros(1, 1, device=clean_BTCHW.device))
        for layer in range(len(self.model.blocks)):
            tokens = self.layer(layer, tokens, modulation, text, attend)

    def predict(
        self,
        noisy_BTCHW: Tensor,
        sigma: float,
        text: TextKV,
        attend: Attend,
        control_BTCHW: Tensor | None = None,
        tiles: Tiles | None = None,
        level: Modulations | None = None,
    ) -> Tensor:
        """`forward` at one level for all frames, in the weights' own precision; single comes back.

        level: what `at` makes of it, where that is known already, or where the pass ends at another one.
        """
        level = level or self.at(sigma)
        return self.told(noisy_BTCHW.to(self.dtype), level, text, attend, control_BTCHW, tiles).float()

    def at(self, sigma: float, end: float | None = None) -> Modulations:
        """What all frames are told of a pass that begins at one level. end: where it is to end; None: there, too."""
        begins, ends = (
            torch.full((1, 1), 1000 * level, device=self.model.patch_embedding.weight.device)
            for level in (sigma, sigma if end is None else end)
        )
        return self.time(begins, ends)

    @property
    def dtype(self) -> torch.dtype:
        return self.model.patch_embedding.weight.dtype

    def embed(
        self,
        latents_BTCHW: Tensor,
        control_BTCHW: Tensor | None = None,
        tiles: Tiles | None = None,
        *,
        coarse: bool = False,
    ) -> Tensor:
        """Tokens (B, N, D). coarse: one for each larger patch."""
        parts, (batch, frames, _, *size) = [latents_BTCHW], latents_BTCHW.shape
        if self.config.position_channels:
            whole = size if tiles is None else tiles.whole(latents_BTCHW)
            where = positions(self.config.position_channels, *whole).to(latents_BTCHW)
            where = where if tiles is None else tiles.gather(where)
            parts.append(where.expand(batch, frames, -1, -1, -1))
        if self.config.control_channels:
            if control_BTCHW is None:
                control_BTCHW = latents_BTCHW.new_zeros(batch, frames, self.config.control_channels, *size)
            parts.append(control_BTCHW.to(latents_BTCHW))
        # A product and not the convolution that it is: oneDNN's in bfloat16 reads beyond a picture one token wide.
        embedding = self.model.far_patch_embedding if coarse else self.model.patch_embedding
        _, p_h, p_w = embedding.kernel_size
        patches = torch.cat(parts, 2).unflatten(4, (-1, p_w)).unflatten(3, (-1, p_h))
        patches = patches.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(1, 3)
        return F.linear(patches, embedding.weight.flatten(1), embedding.bias)

    def time(self, timesteps_BT: Tensor, ends_BT: Tensor | None = None) -> Modulations:
        """Modulation of the layers (B, T, 6, D) and of the head (B, T, 2, D). Scales are around 1."""
        model, shape, gate = self.model, timesteps_BT.shape, self.config.gate_value
        embedder = model.condition_embedder

        def features(times_BT: Tensor) -> Tensor:
            waves: Tensor = embedder.timesteps_proj(times_BT.flatten())
            return waves.to(embedder.time_proj.weight.dtype)

        embedded = embedder.time_embedder(features(timesteps_BT))
        if gate is not None:
            ends_BT = timesteps_BT if ends_BT is None else ends_BT
            told_BT = ends_BT if self.config.deltatime_type == "r" else timesteps_BT - ends_BT
            embedded = torch.lerp(embedded, embedder.delta_embedder(features(told_BT)), gate)
        modulation = embedder.time_proj(embedder.act_fn(embedded)).unflatten(-1, (6, -1)).unflatten(0, shape).float()
        head_modulation = model.scale_shift_table + embedded.unflatten(0, shape)[:, :, None].float()
        modulation[:, :, 1::3] += 1
        head_modulation[:, :, 1] += 1
        return modulation, head_modulation

    def layer(self, index: int, tokens: Tensor, modulation: Tensor, text: TextKV, attend: Attend) -> Tensor:
        block, kind = self.model.blocks[index], tokens.dtype
        heads = (*tokens.shape[:2], -1, self.config.attention_head_dim)
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (block.scale_shift_table + modulation).unbind(2)

        normed = modulated(block.norm1, tokens, scale, shift).to(kind)
        attn = block.attn1
        q = rms_normed(attn.norm_q, attn.to_q(normed)).view(heads)
        k = rms_normed(attn.norm_k, attn.to_k(normed)).view(heads)
        v = attn.to_v(normed).view(heads)
        mixed = attn.to_out[0](attend(index, q, k, v).flatten(2))
        tokens = scaled(mixed.float(), gate, tokens.float()).to(kind)

        attn = block.attn2
        key, value = text[index]
        q = rms_normed(attn.norm_q, attn.to_q(block.norm2(tokens.float()).to(kind)))
        read = attention(q.reshape(len(key), -1, *key.shape[2:]), key, value)  # each group of frames its own words
        tokens = tokens + attn.to_out[0](read.reshape(q.shape))

        normed = modulated(block.norm3, tokens, ffn_scale, ffn_shift).to(kind)
        up, _, down = block.ffn.net
        return scaled(down(up(normed)).float(), ffn_gate, tokens.float()).to(kind)

    def head(self, tokens: Tensor, modulation: Tensor, like_BTCHW: Tensor) -> Tensor:
        model = self.model
        shift, scale = modulation.unbind(2)
        out = model.proj_out(modulated(model.norm_out, tokens, scale, shift).to(tokens.dtype))
        batch, frames, _, height, width = like_BTCHW.shape
        _, p_h, p_w = self.config.patch_size
        out = out.reshape(batch, frames, height // p_h, width // p_w, p_h, p_w, -1)
        return out.permute(0, 1, 6, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)
