"""Teacher forcing in one pass: clean past and noisy chunks side by side, each looking where the KV cache would let it.

The sequence is [clean chunks but the last | noisy chunks]. A clean token looks at clean chunks up to its own; a noisy
token looks at the clean chunks before its own and at its own noisy chunk. Clean chunks run at t = 0, as the cache pass
does; the last one is nobody's past.
"""

import torch
from torch import Tensor

from pipeline.attention import attention, of_past, past_bias, rotate
from pipeline.config import ModelConfig
from pipeline.sampler import clean_from, shut
from pipeline.student import Student, TextKV


class ForcedAttention:
    """Chunk by chunk, so no work goes into pairs that a mask would throw away. `past` clean chunks come first.

    anchored: of those before it a noisy chunk sees only the first.
    """

    def __init__(self, rows: Tensor, past: int, config: ModelConfig, anchored: bool = False) -> None:
        self.rows, self.past, self.anchored = rows, past, anchored
        frames = [config.chunk * chunk for chunk in range(past + 1)]
        self.bias = [past_bias(config.cache, config.tokens_per_frame, count) for count in frames]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = [part.chunk(2 * self.past + 1, 1) for part in (rotate(q, self.rows), rotate(k, self.rows), v)]
        queries, keys, values = parts
        out = []
        for place, query in enumerate(queries):
            # Clean chunk i sees clean 0..i; noisy chunk i sees clean 0..i-1 and itself.
            noisy = place >= self.past
            before = range(place - self.past if noisy else place)
            seen = [*(before[:1] if noisy and self.anchored else before), place]
            key, value = (torch.cat([part[at] for at in seen], 1) for part in (keys, values))
            out.append(attention(query, key, value, of_past(self.bias[len(seen) - 1], query, key)))
        return torch.cat(out, 1)


def teacher_forced(
    student: Student,
    clean_BTCHW: Tensor,
    noisy_BTCHW: Tensor,
    sigmas_BK: Tensor,
    text: TextKV,
    config: ModelConfig,
    control_BTCHW: Tensor | None = None,
    *,
    anchored: bool = False,
) -> Tensor:
    """Flow of the noisy frames. sigmas_BK: a level per chunk. text: batch B * K, a prompt per chunk.

    control_BTCHW: structure of the frames; the clean ones keep to it as the noisy ones do. anchored: noisy chunks see
    the clip's first chunk and themselves alone, which is a stream's sink.
    """
    past = sigmas_BK.shape[1] - 1
    both = [(for_both(key, past), for_both(value, past)) for key, value in text]
    return forced(student, clean_BTCHW, noisy_BTCHW, sigmas_BK, both, config, control_BTCHW, anchored=anchored)


def forced(
    student: Student,
    clean_BTCHW: Tensor,
    noisy_BTCHW: Tensor,
    sigmas_BK: Tensor,
    text: TextKV,
    config: ModelConfig,
    control_BTCHW: Tensor | None = None,
    *,
    anchored: bool = False,
) -> Tensor:
    """The same, where the text is laid out already as `for_both` does it."""
    past = sigmas_BK.shape[1] - 1
    clean = clean_BTCHW[:, : past * config.chunk]
    frames = [*range(clean.shape[1]), *range(noisy_BTCHW.shape[1])]
    timesteps = 1000 * sigmas_BK.repeat_interleave(config.chunk, 1)
    timesteps = torch.cat([torch.zeros_like(timesteps[:, : clean.shape[1]]), timesteps], 1)
    attend = ForcedAttention(student.rope_rows(frames, config.grid), past, config, anchored)
    if control_BTCHW is not None:
        control_BTCHW = torch.cat([control_BTCHW[:, : clean.shape[1]], control_BTCHW], 1)
    return student(torch.cat([clean, noisy_BTCHW], 1), timesteps, text, attend, control_BTCHW)[:, clean.shape[1] :]


def said(
    student: Student,
    past_BTCHW: Tensor,
    noisy_BTCHW: Tensor,
    sigmas_BK: Tensor,
    text: TextKV,
    config: ModelConfig,
    control_BTCHW: Tensor | None = None,
    same_BK: Tensor | None = None,
) -> Tensor:
    """The clean latents that a student names for every chunk, each on the past before it. Single precision.

    same_BK: which chunks are drawn from the words of the one before, booleans; None: all.
    """
    out = teacher_forced(student, past_BTCHW, noisy_BTCHW, sigmas_BK, text, config, control_BTCHW).float()
    return clean_chunks(out, past_BTCHW, noisy_BTCHW, sigmas_BK, config, same_BK)


def clean_chunks(
    out_BTCHW: Tensor,
    past_BTCHW: Tensor,
    noisy_BTCHW: Tensor,
    sigmas_BK: Tensor,
    config: ModelConfig,
    same_BK: Tensor | None = None,
) -> Tensor:
    """The same, from what the transformer put out. Before a chunk's first frame is the past's last one, for a gate."""
    kind, each, sigmas = config.sampler.prediction, config.chunk, per_frame(sigmas_BK, config)
    first = clean_from(kind, out_BTCHW[:, :each], noisy_BTCHW[:, :each], sigmas[:, :each])
    if out_BTCHW.shape[1] == each:
        return first
    last = past_BTCHW[:, each - 1 : -each : each].flatten(0, 1)[:, None]
    out, noisy, sigma = (
        part[:, each:].unflatten(1, (-1, each)).flatten(0, 1) for part in (out_BTCHW, noisy_BTCHW, sigmas)
    )
    if same_BK is not None and kind == "gated":
        out = shut(out, same_BK[:, 1:].flatten()[:, None, None])
    others = clean_from(kind, out, noisy, sigma, last).unflatten(0, (len(first), -1)).flatten(1, 2)
    return torch.cat([first, others], 1)


def per_frame(values_BK: Tensor, config: ModelConfig) -> Tensor:
    """A value per chunk -> broadcastable over the latents of its frames."""
    return values_BK.repeat_interleave(config.chunk, 1)[:, :, None, None, None]


def for_both(part: Tensor, past: int) -> Tensor:
    """A prompt serves its clean and its noisy chunk: batch B * (past + 1) -> B * (2 past + 1)."""
    grouped = part.unflatten(0, (-1, past + 1))
    return torch.cat([grouped[:, :past], grouped], 1).flatten(0, 1)
