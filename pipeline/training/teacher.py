"""Stage 2: the causal teacher, by flow matching with a noise level per chunk and teacher forcing on a noised past.

Two steps of three see single chunks of many scenes, where looks and words are learnt; the third sees whole clips, where
motion and the past are learnt.
"""

import shutil
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.config import ModelConfig
from pipeline.sampler import clean_from, mix
from pipeline.student import Student
from pipeline.text import TextEncoder
from pipeline.training.autoencoder import item_rng
from pipeline.training.clips import CHUNKS, Clips
from pipeline.training.forcing import teacher_forced
from pipeline.training.loop import StageSettings, Trainer

NO_CAPTION_SHARE = 0.1
PAST_NOISE = 0.25
SIGMA_FLOOR = 0.2
MIXED = 3
SINGLES = 40


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


def compiled(denoiser: Denoiser) -> Denoiser:
    """Fuse the element-wise work of the layers: half the time of a step. Stays eager where there is no C++ compiler."""
    if shutil.which("g++") or shutil.which("clang++"):
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


def single_chunks(clips: Clips, step: int, config: ModelConfig) -> tuple[Tensor, list[str]]:
    """One chunk of each of many clips, as a stream's first: what things look like, at a seventh of a clip's work."""
    latents, prompts = clips.batch(step, SINGLES)
    place = item_rng(clips.seed, step, 1).integers(0, CHUNKS, SINGLES)
    chunks = [latents[row, at * config.chunk : (at + 1) * config.chunk] for row, at in enumerate(place)]
    return torch.stack(chunks), [prompts[row * CHUNKS + at] for row, at in enumerate(place)]


def per_frame(values_BK: Tensor, config: ModelConfig) -> Tensor:
    """A value per chunk -> broadcastable over the latents of its frames."""
    return values_BK.repeat_interleave(config.chunk, 1)[:, :, None, None, None]


def train_teacher(
    config: ModelConfig, clips: Clips, folder: Path, settings: StageSettings, *, batch: int = 8, device: str = "cpu"
) -> Denoiser:
    torch.manual_seed(2)
    teacher = Denoiser(config).to(device)
    trainer = Trainer("teacher", folder, teacher, settings)
    compiled(teacher).train()
    shift = config.sampler.shift

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        generator = torch.Generator().manual_seed(step)
        alone = step % MIXED != 0
        clean, prompts = single_chunks(clips, step, config) if alone else clips.batch(step, batch)
        position = torch.sigmoid(torch.randn(len(clean), clean.shape[1] // config.chunk, generator=generator) * 1.2)
        sigmas = (shift * position / (1 + (shift - 1) * position)).to(device)
        clean, noise = clean.to(device), torch.randn(clean.shape, generator=generator).to(device)
        tokens = teacher.text.tokenize(drop_captions(prompts, len(prompts) // len(clean), generator)).to(device)
        with torch.autocast(clean.device.type, dtype=torch.bfloat16):
            text = teacher.student.text_kv(teacher.text(tokens))
            noisy = mix(clean, noise, per_frame(sigmas, config))
            past = noised_past(clean, generator)
            out = teacher_forced(teacher.student, past, noisy, sigmas, text, config).float()
        # The error of the flow; near the clean end a clean prediction's would count without bound.
        made = clean_from(config.sampler.prediction, out, noisy, per_frame(sigmas, config))
        scale = per_frame(sigmas.clamp_min(SIGMA_FLOOR), config)
        error = ((made - clean) / scale).square().mean()
        return error, {"alone" if alone else "clip": error.item()}

    trainer.fit(loss)
    return average(config, trainer)


def average(config: ModelConfig, trainer: Trainer) -> Denoiser:
    """The EMA weights, frozen."""
    made = Denoiser(config)
    made.load_state_dict(trainer.ema.values)
    return made.eval().requires_grad_(False)
