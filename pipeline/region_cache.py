"""What held tiles stand on: their clean latents, pixels and ages, and the keys and values that others see of them.

A held tile keeps the newest clean latent that was computed for it, and shows the last picture of it. In a denoise pass
active tokens look at the past, at each other, and at carried keys of held tokens: stored before rotation, like those of
the KV cache, they are given a position only then: of the chunk that is being made, unless the model is told to leave
them in their own time. Knows nothing of how tiles are chosen.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.attention import CachedAttention, rotate, turns
from pipeline.config import TILE_PIXELS, ModelConfig
from pipeline.kv_cache import KVCache
from pipeline.motion import ProbeMotion, SourceMotion
from pipeline.student import Student
from pipeline.tiles import Tiles

SOFT = 8  # pixels in which a computed tile blends into a held one; motion stays further away from it than that


class RegionCache:
    """Allocated once, reset in place. Nothing is held until a dense chunk was kept (`ready`).

    keys, values: (steps, layers, batch, chunk, tokens, heads, head dim) of the denoise passes, each token's as it was
    last computed in that pass; empty unless the model carries those. latent_BCHW, picture_CHW: the newest of each tile;
    pictures are kept of a single stream only. age_HW: chunks since a tile was computed. source, probe: what held tiles
    were made from. key, since: all else that they stand on, and for how many chunks it has been the same.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        batch: int = 1,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        assert config.tiles is not None, "a model without whole tiles holds nothing"
        student = config.student
        self.carry = config.regions.carry
        self.sigmas: tuple[float, ...] = ()  # the schedule that `keys` and `values` were computed in
        steps = config.sampler.most_steps + 1 if self.by_pass else 0  # one more: a strength between levels
        heads = (student.num_attention_heads, student.attention_head_dim)
        shape = (steps, student.num_layers, batch, config.chunk, config.tokens_per_frame, *heads)
        self.keys, self.values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.latent_BCHW = torch.zeros(batch, config.codec.latent_channels, *config.latent_size, device=device)
        self.picture_CHW = torch.zeros(3, config.height, config.width, dtype=torch.uint8, device=device)
        self.age_HW = np.zeros(config.tiles, np.int64)
        self.source = SourceMotion(device, config.height, config.width)
        self.probe = ProbeMotion(device, (config.codec.latent_channels, *config.latent_size), config.tiles)
        self.per_latent = config.codec.frames
        self.known_from_N = torch.zeros(config.tokens_per_frame, dtype=torch.int64, device=device)
        self.key: tuple[object, ...] = ()
        self.since, self.ready = 0, False

    @property
    def by_pass(self) -> bool:
        """Whether each denoise pass has carried keys of its own."""
        return self.carry in ("same_step", "own_time")

    def reset(self) -> None:
        self.age_HW[:] = 0
        self.known_from_N.zero_()
        self.source.reset()
        self.probe.reset()
        self.key, self.since, self.ready = (), 0, False

    def forget(self, tokens_N: Tensor, before: int) -> None:
        """Nobody looks at these tokens' past any more: they are to show something else."""
        self.known_from_N[tokens_N] = before

    def keep(self, clean_BTCHW: Tensor, tiles: Tiles | None) -> Tensor:
        """Take a chunk's clean latents, a column where `tiles` are chosen. Returns those of the whole chunk.

        A held tile's newest latent stands for it in every latent frame.
        """
        if tiles is None:
            self.latent_BCHW.copy_(clean_BTCHW[:, -1].detach())
            self.age_HW[:] = 0
            self.ready = True
            return clean_BTCHW
        whole = self.latent_BCHW[:, None].repeat(1, clean_BTCHW.shape[1], 1, 1, 1)
        tiles.scatter(clean_BTCHW, whole)
        self.latent_BCHW.copy_(whole[:, -1].detach())
        self.age_HW += 1
        self.age_HW.flat[tiles.index_N.cpu().numpy()] = 0
        return whole

    def show(
        self, frames_TCHW: Tensor, tiles: Tiles | None, faded: Tiles | None = None, moved_HW: Tensor | None = None
    ) -> Tensor:
        """Take a chunk's pictures (uint8), a column where `tiles` are chosen. Returns those of the whole chunk.

        Held tiles show the same bytes in all of them; towards them the others blend into what was there. faded: tiles
        that did not move, which come in picture by picture as well. moved_HW: blocks of pixels that do not blend, else
        what left them would be seen there still.
        """
        if tiles is not None:
            count, device = len(frames_TCHW), frames_TCHW.device
            share = tiles.gather(soft_mask(tiles, self.picture_CHW)[None])
            if moved_HW is not None:
                new, size = tiles.gather(moved_HW[None]), self.picture_CHW.shape[-1] // moved_HW.shape[-1]
                share = share.maximum(new.repeat_interleave(size, 1).repeat_interleave(size, 2))
            if faded is not None and len(faded):
                rising = torch.linspace(0, 1, count + 1, device=device)[1:, None, None, None]
                slow = torch.isin(tiles.index_N, faded.index_N).repeat_interleave(TILE_PIXELS)[:, None]
                share = torch.where(slow, share * rising, share)
            old, new = tiles.gather(self.picture_CHW).float(), frames_TCHW.float()
            blended = torch.lerp(old.expand_as(new), new, share).round_().to(torch.uint8)
            frames_TCHW = self.picture_CHW.expand(count, -1, -1, -1).clone()
            tiles.scatter(blended, frames_TCHW)
        self.picture_CHW.copy_(frames_TCHW[-1])
        return frames_TCHW


def soft_mask(tiles: Tiles, picture_CHW: Tensor) -> Tensor:
    """How much of each pixel, (H, W), is new: all within the tiles, and less and less towards others."""
    held = torch.ones(tiles.rows * tiles.columns, device=picture_CHW.device)
    held[tiles.index_N] = 0
    blocks = (
        held.view(tiles.rows, -1).repeat_interleave(TILE_PIXELS // SOFT, 0).repeat_interleave(TILE_PIXELS // SOFT, 1)
    )
    corners = 1 - F.max_pool2d(F.pad(blocks[None], (1, 1, 1, 1), mode="replicate"), 2, 1)[0]
    down, across = (hats(size).to(corners) for size in picture_CHW.shape[1:])
    return down @ corners @ across.T


@lru_cache(maxsize=4)
def hats(size: int) -> Tensor:
    """Linear interpolation from every SOFT-th edge between pixels to the pixels, (size, edges)."""
    distance = (torch.arange(size)[:, None] + 0.5) / SOFT - torch.arange(size // SOFT + 1)
    return (1 - distance.abs()).clamp_(min=0)


def going_back(places: list[int]) -> list[list[int]]:
    """Positions of a chunk's frames, of those a chunk before, and so on; no frame is before the oldest that can be."""
    chunk = len(places)
    return [
        [max(place - back * chunk, frame) for frame, place in enumerate(places)]
        for back in range(-(-places[0] // chunk) + 1)
    ]


class RegionAttention(CachedAttention):
    """CachedAttention that remembers what it computed, and can go on with chosen tiles alone.

    step: the denoise pass that is being run; the caller counts it. sigmas: the schedule that is asked for; keys that
    were carried from another one are of other passes, and the clean ones serve instead until a dense chunk has made new
    ones.
    """

    def __init__(
        self,
        cache: KVCache,
        student: Student,
        grid: tuple[int, int],
        chunk: int,
        regions: RegionCache,
        sigmas: Sequence[float],
    ) -> None:
        super().__init__(cache, student, grid, chunk)
        self.regions, self.grid, self.sigmas, self.step = regions, grid, tuple(sigmas), 0
        numbers = torch.tensor(cache.numbers(), dtype=torch.int64, device=regions.known_from_N.device)
        known = (numbers[:, None] >= regions.known_from_N).flatten()
        self._known = None if bool(known.all()) else known.nonzero()[:, 0]
        if self._known is not None:
            self.sink = int((self._known < self.sink).sum())
            self.bias = None if self.bias is None else self.bias[self._known]
        if regions.carry == "own_time":
            own = cache.positions(chunk, student.config.rope_max_seq_len)[self.frames :]
            self._rows_back = torch.stack([turns(student.rope_rows(places, grid)) for places in going_back(own)])
        self._tiles: Tiles | None = None
        self._tokens_N: Tensor | None = None

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """Without what was forgotten."""
        keys, values = super().read(layer)
        if self._known is None:
            return keys, values
        return keys.index_select(1, self._known), values.index_select(1, self._known)

    def choose(self, tiles: Tiles | None) -> None:
        """From now on the tokens of these tiles alone are handed in; None: all of them."""
        if tiles is self._tiles:
            return
        self._tiles, self._tokens_N = tiles, None if tiles is None else tiles.tokens(self.grid)
        if self._tokens_N is not None:
            self._active_rows = self.rows.unflatten(0, (-1, self.tokens))[:, self._tokens_N].flatten(0, 1)
            self._carried_rows = self.rows if self.regions.carry != "own_time" else self._rows_then(self._tokens_N)

    def _rows_then(self, active_N: Tensor) -> Tensor:
        """Rotations of the chunks in which the held tokens were computed; those of active tokens are of this one."""
        age_HW, (rows, columns) = self.regions.age_HW, self.grid
        whole = np.ones((rows // age_HW.shape[0], columns // age_HW.shape[1]), np.int64)
        chunks_N = torch.from_numpy(np.kron(age_HW + 1, whole)).flatten().to(active_N.device)
        chunks_N[active_N] = 0
        back = chunks_N.clamp_(max=len(self._rows_back) - 1).repeat(len(self.rows) // self.tokens)
        return self._rows_back[back, torch.arange(len(back), device=back.device)]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        same_step = not self.writing and self.regions.by_pass
        if self._tokens_N is None:
            if same_step:
                self.regions.sigmas = self.sigmas
                for kept, x in ((self.regions.keys, k), (self.regions.values, v)):
                    kept[self.step, layer].flatten(1, 2).copy_(x.detach())
            return super().__call__(layer, q, k, v)
        same_step = same_step and self.regions.sigmas == self.sigmas
        of_frames = (len(k), -1, len(self._tokens_N), *k.shape[2:])
        q, k, v = rotate(q, self._active_rows), k.reshape(of_frames), v.reshape(of_frames)
        if not self.writing and self.regions.carry == "none":
            own_k, own_v = rotate(k.flatten(1, 2), self._active_rows), v.flatten(1, 2)
        else:
            if same_step:
                keys, values = self.regions.keys[self.step, layer], self.regions.values[self.step, layer]
            else:
                newest, frames = self.cache.newest(layer), k.shape[1]
                keys, values = (held[:, None].expand(-1, frames, -1, -1, -1).clone() for held in newest)
            k, v = k.to(keys.dtype), v.to(values.dtype)  # training runs in a narrower type than what is carried
            keys.index_copy_(2, self._tokens_N, k.detach())
            values.index_copy_(2, self._tokens_N, v.detach())
            if self.writing:
                self.cache.write(layer, keys, values)
            if k.requires_grad:  # what is carried on has no gradient, what is computed here has
                keys, values = (held.index_copy(2, self._tokens_N, x) for held, x in ((keys, k), (values, v)))
            own_k = rotate(keys.flatten(1, 2), self._carried_rows if same_step else self.rows)
            own_v = values.flatten(1, 2)
        return self.look(q, *self.after_past(layer, own_k, own_v))
