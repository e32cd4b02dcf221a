"""Teacher forcing in one pass: clean past and noisy chunks side by side, each looking where the KV cache would let it.

The sequence is [clean chunks | noisy chunks]. A clean token looks at clean chunks up to its own; a noisy token looks
at the clean chunks before its own and at its own noisy chunk. The clean half runs at t = 0, as the cache pass does.
"""

import torch
from torch import Tensor

from pipeline.config import ModelConfig
from pipeline.student import Student, TextKV, attention, rotate


class ForcedAttention:
    """Chunk by chunk, so no work goes into pairs that a mask would throw away (3.2 times less at four chunks)."""

    def __init__(self, rows: Tensor, chunks: int) -> None:
        self.rows, self.chunks = rows, chunks

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = [part.chunk(2 * self.chunks, 1) for part in (rotate(q, self.rows), rotate(k, self.rows), v)]
        queries, keys, values = parts
        out = []
        for place, query in enumerate(queries):
            # Clean chunk i sees clean 0..i; noisy chunk i sees clean 0..i-1 and itself.
            noisy = place >= self.chunks
            seen = [*range(place - self.chunks), place] if noisy else [*range(place + 1)]
            out.append(
                attention(query, torch.cat([keys[at] for at in seen], 1), torch.cat([values[at] for at in seen], 1))
            )
        return torch.cat(out, 1)


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
    noisy_t = 1000 * sigmas_BK.repeat_interleave(config.chunk, 1)
    timesteps = torch.cat([torch.zeros_like(noisy_t), noisy_t], 1)
    both = torch.cat([clean_BTCHW, noisy_BTCHW], 1)
    return student(both, timesteps, doubled(text, chunks), ForcedAttention(rows, chunks))[:, frames:]


def doubled(text: TextKV, chunks: int) -> TextKV:
    """The same prompts serve both halves: batch B * K -> B * 2 K."""

    def twice(part: Tensor) -> Tensor:
        return part.unflatten(0, (-1, chunks)).repeat(1, 2, 1, 1, 1).flatten(0, 1)

    return [(twice(key), twice(value)) for key, value in text]
