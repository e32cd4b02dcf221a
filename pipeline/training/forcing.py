"""Teacher forcing in one pass: clean past and noisy chunks side by side under one mask.

The sequence is [clean chunks | noisy chunks]. A clean token looks at clean chunks up to its own; a noisy token looks
at the clean chunks before its own and at its own noisy chunk: what the KV cache shows it at inference. The clean half
runs at t = 0, as the cache pass does.
"""

from functools import lru_cache

import torch
from torch import Tensor

from pipeline.config import ModelConfig
from pipeline.student import MaskedAttention, Student, TextKV


@lru_cache(maxsize=8)
def forcing_mask(chunks: int, tokens: int) -> Tensor:
    """Boolean (2 * chunks * tokens) squared, true = may look."""
    owner = torch.arange(chunks).repeat_interleave(tokens)
    query, key = owner[:, None], owner[None]
    clean = torch.cat([query >= key, torch.zeros(len(owner), len(owner), dtype=torch.bool)], 1)
    noisy = torch.cat([query > key, query == key], 1)
    return torch.cat([clean, noisy])


def teacher_forced(
    student: Student,
    clean_BTCHW: Tensor,
    noisy_BTCHW: Tensor,
    sigmas_BK: Tensor,
    text: TextKV,
    config: ModelConfig,
) -> Tensor:
    """Flow of the noisy frames. sigmas_BK: a level per chunk. text: batch B * K, a prompt per chunk."""
    frames = clean_BTCHW.shape[1]
    chunks = frames // config.chunk
    rows = student.rope_rows(list(range(frames)), config.grid).repeat(1, 2, 1, 1)
    mask = forcing_mask(chunks, config.chunk * config.tokens_per_frame)
    noisy_t = 1000 * sigmas_BK.repeat_interleave(config.chunk, 1)
    timesteps = torch.cat([torch.zeros_like(noisy_t), noisy_t], 1)
    # The same prompts serve both halves.
    doubled = [
        (
            key.unflatten(0, (-1, chunks)).repeat(1, 2, 1, 1, 1).flatten(0, 1),
            value.unflatten(0, (-1, chunks)).repeat(1, 2, 1, 1, 1).flatten(0, 1),
        )
        for key, value in text
    ]
    both = torch.cat([clean_BTCHW, noisy_BTCHW], 1)
    return student(both, timesteps, doubled, MaskedAttention(rows, mask))[:, frames:]
