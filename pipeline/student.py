"""The causal few-step student: our own explicit forward over the modules of diffusers' `WanTransformer3DModel`, or of
its `AnyFlowFARTransformer3DModel`, which has two more: patches for older frames, and an embedding of a pass's end.

The forward is one loop over layers; who may look at whom is decided by the `attend` object handed in: the stream's
KV cache at inference (`attention.CachedAttention`), whole clips side by side in training (`training/forcing.py`). Sizes
come from the config, so a pocket student and a Wan checkpoint run through the same lines. Knows nothing of schedules
and codecs.
"""

import inspect
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from typing import Any

import diffusers
import torch
from diffusers.utils import import_utils
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.attention import Attend, CachedAttention, attention
from pipeline.config import StudentConfig
from pipeline.tiles import Tiles

# diffusers imports an installed xformers without a guard, and one that does not fit the machine would end the program.
# Attention is ours, so nothing is lost.
import_utils._xformers_available = False
from diffusers import WanTransformer3DModel  # noqa: E402
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed  # noqa: E402

TextKV = Sequence[tuple[Tensor, Tensor]]
Modulations = tuple[Tensor, Tensor]


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
