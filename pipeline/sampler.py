"""Flow-matching schedules and the few-step sampler: pure functions on latents.

A level sigma in [0, 1] mixes clean latents with noise: x = (1 - sigma) * clean + sigma * noise; the student predicts
the flow noise - clean; the timestep it is told is 1000 * sigma, a fraction where the shift makes it one.
Source: rectified flow (Liu et al. 2022), the shift of Esser et al. 2024, few-step re-noising of Self-Forcing (2025),
the flow map of AnyFlow (2026).
Knows nothing of caches, codecs or prompts.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from pipeline.config import ModelConfig, SamplerConfig


def shifted(position: float, shift: float) -> float:
    """Move a level in [0, 1] towards noise: shift * p / (1 + (shift - 1) * p)."""
    return shift * position / (1 + (shift - 1) * position)


def even_steps(count: int) -> tuple[float, ...]:
    """Positions of `count` passes, evenly spaced before the shift."""
    return tuple(1000 * (count - step) / count for step in range(count))


def with_steps(config: ModelConfig, count: int) -> ModelConfig:
    """The same model with so many passes a chunk, evenly spaced."""
    return replace(config, sampler=replace(config.sampler, steps=even_steps(count), first_steps=()))


def levels(config: SamplerConfig, *, first: bool = False, count: int = 0) -> list[float]:
    """Sigma of each denoise pass, from noise to clean.

    first: of a stream's first chunk. count: so many passes instead of the model's own, evenly spaced before the shift.
    """
    steps = config.first_steps if first and config.first_steps else config.steps
    if count and count != len(steps):
        steps = even_steps(count)
    return [shifted(step / 1000, config.shift) for step in steps]


def from_noise(sigmas: list[float]) -> list[float]:
    """The schedule where there is nothing to begin from: one that was made for drawing over a video starts lower."""
    return [1.0, *sigmas[1:]]


def levels_from(config: SamplerConfig, start: float, *, first: bool = False, count: int = 0) -> list[float]:
    """The schedule when denoising begins part-way at `start` (SDEdit): that level, then the schedule's lower ones."""
    if start <= 0:
        return []
    return [start, *(sigma for sigma in levels(config, first=first, count=count) if sigma < start)]


def lowered(sigmas: list[float], less: float) -> list[float]:
    """The same schedule, begun so much lower. A level that lies above then becomes the start's.

    It has as many passes as before, so that chunks take as long and each pass stays what it was; begun at 0, none.
    """
    start = sigmas[0] - less if sigmas else 0.0
    return [min(sigma, start) for sigma in sigmas] if start > 0 else []


def mix(clean: Tensor, noise: Tensor, sigma: float | Tensor) -> Tensor:
    return (1 - sigma) * clean + sigma * noise


def clean_from_flow(noisy: Tensor, flow: Tensor, sigma: float | Tensor) -> Tensor:
    return noisy - sigma * flow


def clean_from(
    prediction: str, out: Tensor, noisy: Tensor, sigma: float | Tensor, last: Tensor | None = None
) -> Tensor:
    """Clean latents, from what the transformer put out: the flow, the clean latents themselves, or those and a gate.

    last: the latent frame before these, (B, 1, C, h, w); None: a stream begins. A gate lets the frame before each one
    through, which is the answer before it, but for the first.
    """
    if prediction == "flow":
        return clean_from_flow(noisy, out, sigma)
    if prediction == "clean":
        return out
    frames, gates = out[:, :, :-1].split(1, 1), out[:, :, -1:].sigmoid().split(1, 1)
    kept: list[Tensor] = []
    for frame, gate in zip(frames, gates, strict=True):
        kept.append(frame if last is None else torch.lerp(frame, last.expand_as(frame), gate))
        last = kept[-1]
    return torch.cat(kept, 1)


def guide(prediction: str, told: Tensor, free: Tensor, guidance: float) -> Tensor:
    """What a transformer put out under words, led on from what it put out without any.

    A gate stays the words' own, and what it lets through is not led: else each chunk would push what stands still
    further away from the frame before it.
    Source: classifier-free guidance (Ho and Salimans 2022).
    """
    led = free + guidance * (told - free)
    return torch.cat([led[:, :, :-1], told[:, :, -1:]], 2) if prediction == "gated" else led


def shut(out: Tensor, same_BHW: Tensor) -> Tensor:
    """What a transformer with a gate put out, the gate of the first frame shut where new words are drawn.

    The frame before shows what the words before told. same_BHW: booleans, of rows or cells whose words are the same.
    """
    gates = [out[:, :1, -1:].masked_fill(~same_BHW[:, None, None], -torch.inf), out[:, 1:, -1:]]
    return torch.cat([out[:, :, :-1], torch.cat(gates, 1)], 2)


def ends(sigmas: list[float]) -> list[float]:
    """Where each pass's way ends: where the next one begins, and the last at clean latents."""
    return [*sigmas[1:], 0.0]


class Anchor:
    """Which passes of one chunk see the sink alone, and the gate that these take from the last that saw more.

    What stands still is told by the newest past, which they do not see.
    """

    def __init__(self, config: SamplerConfig, *, on: bool) -> None:
        self.level = config.anchored if on else 0.0
        self.gated = config.prediction == "gated"
        self.gate: Tensor | None = None

    def holds(self, sigma: float) -> bool:
        return sigma <= self.level

    def keep(self, out: Tensor, sigma: float) -> Tensor:
        """What a pass put out, with the gate that counts."""
        if not self.gated or not self.level:
            return out
        if not self.holds(sigma) or self.gate is None:
            self.gate = out[:, :, -1:]
            return out
        return torch.cat([out[:, :, :-1], self.gate], 2)


def draw_noise(shape: tuple[int, ...], seed: int, chunk: int, step: int) -> Tensor:
    """Unit normal noise, a pure function of its arguments (Philox): a token's noise does not depend on who asks."""
    bits = np.random.Philox(key=np.array([seed, chunk * 256 + step], dtype=np.uint64))
    return torch.from_numpy(np.random.Generator(bits).standard_normal(shape, dtype=np.float32))


def denoise(
    student: Callable[[Tensor, float, int], Tensor],
    noise: Callable[[int], Tensor],
    sigmas: list[float],
    source: Tensor | None = None,
    prediction: str = "flow",
    last: Tensor | None = None,
) -> Tensor:
    """Run the denoise passes; returns clean latents.

    student(noisy, sigma, step): puts out what `prediction` names. noise(step): fresh unit noise of one step.
    source: clean latents to begin from; needed when sigmas do not start at 1. No sigmas: the source comes back.
    last: see `clean_from`. A mean flow is followed from level to level: only the first pass's noise is drawn.
    """
    if source is None:
        assert sigmas and sigmas[0] == 1.0, "denoising without a source starts from pure noise"
        clean = torch.zeros_like(noise(0))
    else:
        clean = source
    if prediction == "mean_flow" and sigmas:
        return travel(student, mix(clean, noise(0), sigmas[0]), sigmas)
    for step, sigma in enumerate(sigmas):
        noisy = mix(clean, noise(step), sigma)
        clean = clean_from(prediction, student(noisy, sigma, step), noisy, sigma, last)
    return clean


def travel(student: Callable[[Tensor, float, int], Tensor], noisy: Tensor, sigmas: list[float]) -> Tensor:
    """Follow a mean flow from the first level to clean latents. A pass whose way has no length is left out.

    Source: the Euler steps of AnyFlow's flow map (2026).
    """
    for step, (sigma, end) in enumerate(zip(sigmas, ends(sigmas), strict=True)):
        if sigma > end:
            noisy = noisy - (sigma - end) * student(noisy, sigma, step)
    return noisy
