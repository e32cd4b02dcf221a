"""Stage 2: the causal teacher, by flow matching with a noise level per chunk and teacher forcing on a noised past.

One step of three sees openings of many scenes, where looks and words are learnt; the rest see whole clips, where motion
and the past are learnt.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.config import ModelConfig
from pipeline.sampler import clean_from, mix
from pipeline.student import Student
from pipeline.text import TextEncoder
from pipeline.training.clips import Clips
from pipeline.training.forcing import teacher_forced
from pipeline.training.loop import Trainer, can_compile
from pipeline.training.settings import TeacherSettings

NO_CAPTION_SHARE = 0.1
PAST_NOISE = 0.25
SIGMA_FLOOR = 0.2
NOISE_ONLY_SHARE = 0.15


Sample = Callable[["Denoiser", Path], Path]
"""Draws what a denoiser makes into a folder, and returns the sheet's path."""


class Denoiser(nn.Module):
    """The transformer and its text encoder: what teacher and student are made of."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.text = TextEncoder(config.text, config.student.text_dim)
        self.student = Student(config.student)
        blocks = self.student.model.blocks
        for block in blocks:  # residual branches start small: a few layers train faster so
            nn.init.zeros_(block.attn1.to_out[0].weight)
            nn.init.zeros_(block.attn2.to_out[0].weight)
        nn.init.zeros_(self.student.model.proj_out.weight)

    def hidden_matrices(self) -> Iterator[nn.Parameter]:
        """The weights between layers, without embeddings, modulation and head: what Muon is made for."""
        for part in (self.student.model.blocks, self.text.layers):
            yield from (value for value in part.parameters() if value.ndim == 2 and value.requires_grad)


def compiled(denoiser: Denoiser) -> Denoiser:
    """Fuse the element-wise work of the layers: half the time of a step. Stays eager where there is no C++ compiler."""
    if can_compile():
        # One graph a layer, with and without gradients.
        torch._dynamo.config.recompile_limit = 64
        denoiser.student.layer = torch.compile(denoiser.student.layer, dynamic=False)  # type: ignore[method-assign]
    return denoiser


def noised_past(clean: Tensor, generator: torch.Generator) -> Tensor:
    """The past as the student will really see it: slightly wrong. Half of the clips stay clean."""
    size = torch.rand(len(clean), 1, 1, 1, 1, generator=generator) * PAST_NOISE
    size = size * (torch.rand(size.shape, generator=generator) < 0.5)
    noise = torch.randn(clean.shape, generator=generator)
    return mix(clean, noise.to(clean.device), size.to(clean.device))


def drop_captions(prompts: list[str], per_clip: int, generator: torch.Generator) -> list[str]:
    """Whole clips lose their caption, for guidance."""
    keep = torch.rand(len(prompts) // per_clip, generator=generator) >= NO_CAPTION_SHARE
    return [prompt if keep[index // per_clip] else "" for index, prompt in enumerate(prompts)]


def per_frame(values_BK: Tensor, config: ModelConfig) -> Tensor:
    """A value per chunk -> broadcastable over the latents of its frames."""
    return values_BK.repeat_interleave(config.chunk, 1)[:, :, None, None, None]


def noise_levels(count: int, chunks: int, shift: float, generator: torch.Generator) -> Tensor:
    """A level for each chunk, (count, chunks): mostly in the middle, and pure noise more often than chance has it.

    The first of a few steps is taken from pure noise, and all that follows stands on it.
    """
    position = torch.sigmoid(torch.randn(count, chunks, generator=generator) * 1.2)
    sigmas = shift * position / (1 + (shift - 1) * position)
    return torch.where(torch.rand(count, chunks, generator=generator) < NOISE_ONLY_SHARE, 1.0, sigmas)


def train_teacher(
    config: ModelConfig,
    openings: Clips,
    clips: Clips,
    folder: Path,
    settings: TeacherSettings,
    *,
    sample: Sample | None = None,
    device: str = "cpu",
) -> Denoiser:
    """Train until the budget is spent; returns the average, frozen."""
    torch.manual_seed(2)
    teacher = Denoiser(config).to(device)
    trainer = Trainer("teacher", folder, teacher, settings)
    compiled(teacher).train()

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        generator = torch.Generator().manual_seed(step)
        alone = step % 3 == 0
        data, count = (openings, settings.openings) if alone else (clips, settings.clips)
        clean, prompts, known = data.batch(step, count)
        sigmas = noise_levels(count, data.chunks, config.sampler.shift, generator).to(device)
        clean, noise = clean.to(device), torch.randn(clean.shape, generator=generator).to(device)
        tokens = teacher.text.tokenize(drop_captions(prompts, data.chunks, generator)).to(device)
        with torch.autocast(clean.device.type, dtype=torch.bfloat16):
            text = teacher.student.text_kv(teacher.text(tokens))
            noisy = mix(clean, noise, per_frame(sigmas, config))
            past = noised_past(clean, generator)
            out = teacher_forced(teacher.student, past, noisy, sigmas, text, config).float()
        # The error of the flow; near the clean end a clean prediction's would count without bound.
        made = clean_from(config.sampler.prediction, out, noisy, per_frame(sigmas, config))
        scale = per_frame(sigmas.clamp_min(SIGMA_FLOOR), config)
        weight = per_frame(known.to(device), config).expand_as(clean)
        error = (((made - clean) / scale).square() * weight).sum() / weight.sum()
        return error, {"opening" if alone else "clip": error.item()}

    trainer.fit(loss, sample and (lambda: sample(average(config, trainer), folder)))
    return average(config, trainer)


def average(config: ModelConfig, trainer: Trainer) -> Denoiser:
    """The EMA weights, frozen."""
    made = Denoiser(config)
    made.load_state_dict(trainer.ema.values)
    return made.eval().requires_grad_(False)
