"""A rollout in training: many streams in step, made by the very code that a live stream runs.

Cache, positions, schedule and noise are the engine's; a test holds the two equal. What training adds is where the
gradient goes: through one denoise pass of each chunk, the last that is run. Knows nothing of losses.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.attention import Attend, CachedAttention
from pipeline.config import ModelConfig
from pipeline.kv_cache import KVCache
from pipeline.region_cache import RegionAttention, RegionCache
from pipeline.sampler import Anchor, denoise, draw_noise, levels, shut
from pipeline.student import Student, TextKV
from pipeline.tiles import Tiles


def roll_out(
    student: Student,
    texts: Sequence[TextKV],
    seeds: Sequence[int],
    passes: Sequence[int],
    config: ModelConfig,
    masks: Sequence[np.ndarray | None] = (),
    same_BK: Tensor | None = None,
) -> list[Tensor]:
    """Make chunks from noise, each on the ones before it. Returns the clean latents of every chunk, (B, T, C, h, w).

    texts: cross-attention keys and values for each chunk, batch B. seeds: one a stream. passes: how many denoise passes
    each chunk gets, from 1 to the schedule's length; the last of them carries the gradient, if gradients are on.
    masks: the tiles that are computed in each chunk, the same for all streams; None is all of them, as in the first.
    The others are held, as region caching holds them. No masks: nothing is held in any chunk.
    same_BK: in which chunks a stream is drawn from the words of the one before, booleans; None: in all. A tile that is
    held then is drawn from new ones when its turn comes.
    """
    device = texts[0][0][0].device
    cache = KVCache.of(config, batch=len(seeds), device=device)
    sigmas, learning = levels(config.sampler), torch.is_grad_enabled()
    size = (1, config.chunk, config.codec.latent_channels, *config.latent_size)
    regions = RegionCache(config, batch=len(seeds), device=device) if masks else None
    chunks: list[Tensor] = []
    fresh_BHW = None  # cells that were not drawn yet from the words that now hold
    if same_BK is not None and config.sampler.prediction == "gated":
        fresh_BHW = torch.zeros(len(seeds), *config.latent_size, dtype=torch.bool, device=device)
    for index, (text, count) in enumerate(zip(texts, passes, strict=True)):
        attend, tiles = CachedAttention(cache, student, config.grid, config.chunk), None
        if regions is not None:
            mask_HW = masks[index]
            tiles = None if mask_HW is None else Tiles.of(mask_HW, device)
            attend = RegionAttention(cache, student, config.grid, config.chunk, regions, sigmas)
            attend.choose(tiles)
        same_BHW = None
        if fresh_BHW is not None and same_BK is not None:
            fresh_BHW |= ~same_BK[:, index, None, None]
            same_BHW = ~(fresh_BHW if tiles is None else tiles.gather(fresh_BHW))
        anchor = Anchor(config.sampler, on=index > 0)
        # Compiled layers break here: each length of the past would be a graph of its own.
        look: Attend = torch.compiler.disable(attend.__call__)

        def noise(step: int, index: int = index, tiles: Tiles | None = tiles) -> Tensor:
            drawn = torch.cat([draw_noise(size, seed, index, step) for seed in seeds]).to(device)
            return drawn if tiles is None else tiles.gather(drawn)

        def said(
            noisy: Tensor,
            sigma: float,
            step: int,
            text: TextKV = text,
            count: int = count,
            look: Attend = look,
            attend: CachedAttention = attend,
            tiles: Tiles | None = tiles,
            same_BHW: Tensor | None = same_BHW,
            anchor: Anchor = anchor,
        ) -> Tensor:
            if isinstance(attend, RegionAttention):
                attend.step = step
            attend.anchored = anchor.holds(sigma)
            with torch.set_grad_enabled(learning and step == count - 1):
                out = student(noisy, torch.full((1, 1), 1000 * sigma, device=device), text, look, None, tiles).float()
            return anchor.keep(out if same_BHW is None else shut(out, same_BHW), sigma)

        last = chunks[-1][:, -1:].detach() if chunks else None
        if last is not None and tiles is not None:
            last = tiles.gather(last)
        clean = denoise(said, noise, sigmas[:count], None, config.sampler.prediction, last)
        with torch.no_grad():
            attend.writing, attend.anchored = True, False
            student(clean.detach(), torch.zeros(1, 1, device=device), text, look, None, tiles)
            cache.commit(config.chunk)
        if fresh_BHW is not None and same_BHW is not None:
            if tiles is None:
                fresh_BHW.fill_(False)
            else:
                tiles.scatter(torch.zeros_like(same_BHW), fresh_BHW)
        chunks.append(clean if regions is None else regions.keep(clean, tiles))
    return chunks


def roll_out_clip(
    student: Student,
    words_BLD: Tensor,
    seeds: Sequence[int],
    passes: Sequence[int],
    longer: int,
    config: ModelConfig,
    masks: Sequence[np.ndarray | None] = (),
    same_BK: Tensor | None = None,
) -> Tensor:
    """Roll out and return a clip of what the cache remembers at the end, (B, T, C, h, w): the first and newest chunks.

    words: those of each chunk of the clip, a stream's together. longer: so many chunks lie between the clip's first and
    its others; they are made without gradients, under the second one's words. same_BK: which of the clip's chunks are
    drawn from the words of the one before, booleans; None: all.
    """
    with_text = [student.text_kv(each.contiguous()) for each in words_BLD.unflatten(0, (len(seeds), -1)).unbind(1)]
    with_between = [with_text[0], *[with_text[1]] * longer, *with_text[1:]]
    if same_BK is not None:
        same_BK = torch.cat([same_BK[:, :2], torch.ones_like(same_BK[:, :1]).expand(-1, longer), same_BK[:, 2:]], 1)
    chunks = roll_out(student, with_between, seeds, passes, config, masks, same_BK)
    return torch.cat([chunks[0], *chunks[1 + longer :]], 1)
