"""Stage 2: the causal teacher, by flow matching with a noise level per chunk and teacher forcing on an imperfect past.

What a stream remembers is what the model drew, soft and a little off. So in half of the clips the past is drawn by the
model itself, from the true chunks noised, once or several times over, and the target stays the true one: it learns to
put right what it sees, and what has worn off along a stream; half of these pasts are drawn under another clip's words,
so that it comes back to its own. A model with a gate is asked to let stand what stands still, too, where the past is
only a little off.
Source: resampling of the history (Resampling Forcing, 2025), noised history (Diffusion Forcing, 2024).

One step of three sees openings of many scenes, where looks and words are learnt; the rest see whole clips, where motion
and the past are learnt.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config import ModelConfig
from pipeline.sampler import mix
from pipeline.student import Student, TextKV
from pipeline.text import TextEncoder
from pipeline.training.clips import Clips
from pipeline.training.forcing import clean_chunks, per_frame, said, teacher_forced
from pipeline.training.loop import Trainer, can_compile
from pipeline.training.settings import TeacherSettings

NO_CAPTION_SHARE = 0.1
PAST_NOISE = 0.25
DRAWN_LOWEST, DRAWN_MOST = 0.5, 3
SIGMA_FLOOR = 0.2
NOISE_ONLY_SHARE = 0.15
OUTLINES_SEEN = 0.75
GATE_START, GATE_WEIGHT = -2.0, 0.3
STILL, NEAR = 0.05, 0.4  # root mean squares of a cell's channels: hardly changed, and not far off
MOVER_WEIGHT = 4.0  # on top of 1: what a place looks like in detail is chance, and would drown the mover


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
        if config.sampler.prediction == "gated":  # at first little of the frame before comes through
            with torch.no_grad():
                self.student.model.proj_out.bias.view(-1, config.student.out_channels)[:, -1] = GATE_START
        if config.student.control_channels:  # a model that is told no structure is the same as one that knows none
            with torch.no_grad():
                self.student.model.patch_embedding.weight[:, -config.student.control_channels :] = 0

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


@torch.no_grad()
def drawn(
    denoiser: Denoiser,
    clean: Tensor,
    text: TextKV,
    control: Tensor,
    config: ModelConfig,
    generator: torch.Generator,
    same_BK: Tensor,
) -> Tensor:
    """Clips as the model draws them: its answer to the true ones at levels between half and pure noise, and up to
    `DRAWN_MOST` times the answer to that, for a stream's past was drawn from a past that was."""
    low, chunks, past = DRAWN_LOWEST, clean.shape[1] // config.chunk, clean
    for _ in range(int(torch.randint(1, DRAWN_MOST + 1, (), generator=generator))):
        sigmas = (low + (1 - low) * torch.rand(len(clean), 1, generator=generator)).expand(-1, chunks).to(clean.device)
        noisy = mix(past, torch.randn(clean.shape, generator=generator).to(clean.device), per_frame(sigmas, config))
        past = said(denoiser.student, past, noisy, sigmas, text, config, control, same_BK)
    return past


def imperfect_past(
    denoiser: Denoiser,
    clean: Tensor,
    text: TextKV,
    control: Tensor,
    config: ModelConfig,
    generator: torch.Generator,
    same_BK: Tensor,
) -> Tensor:
    """The past that a batch is forced on: drawn by the model in every other clip, noised or true in the rest.

    Every other of the drawn ones is drawn under another clip's words, so that it shows less and less of what its own
    tell. With a gate the rest are only true: a noised frame is none to keep.
    """
    past = clean.clone() if config.sampler.prediction == "gated" else noised_past(clean, generator)
    if clean.shape[1] > config.chunk:  # an opening has no past
        rows = torch.arange(0, len(clean), 2)
        told = torch.where(rows % 4 == 0, rows, rows.roll(-1)).to(clean.device)
        words = [tuple(part.unflatten(0, (len(clean), -1))[told].flatten(0, 1) for part in pair) for pair in text]
        past[::2] = drawn(denoiser, clean[::2], words, control[::2], config, generator, same_BK[told])
    return past


def held(clean: Tensor, past: Tensor, config: ModelConfig, same_BK: Tensor) -> tuple[Tensor, Tensor]:
    """Clips as a gate should leave them: a cell that stands still stays as the frame before has it.

    Before a chunk that is the past's; not where it is far from the truth: there it is to be put right, nor where the
    words are new. The second tensor says which cells stay, (B, T, 1, h, w), boolean.
    """
    target, stays = [clean[:, 0]], [torch.zeros_like(clean[:, 0, :1], dtype=torch.bool)]
    for frame in range(1, clean.shape[1]):
        true, seen = clean[:, frame - 1], past[:, frame - 1] if frame % config.chunk == 0 else target[-1]
        stands, near = (
            part.square().mean(1, keepdim=True).sqrt() < limit
            for part, limit in ((clean[:, frame] - true, STILL), (seen - true, NEAR))
        )
        may = same_BK[:, frame // config.chunk, None, None, None] | bool(frame % config.chunk)
        stays.append(stands & near & may)
        target.append(torch.where(stays[-1], seen, clean[:, frame]))
    return torch.stack(target, 1), torch.stack(stays, 1)


def unchanged(prompts: list[str], per_clip: int) -> Tensor:
    """Which chunks are drawn from the words of the one before, (B, K), booleans. A clip's first one has none."""
    clips = [prompts[at : at + per_clip] for at in range(0, len(prompts), per_clip)]
    return torch.tensor([[False, *(text == before for before, text in pairwise(clip))] for clip in clips])


def drop_captions(prompts: list[str], per_clip: int, generator: torch.Generator) -> list[str]:
    """Whole clips lose their caption, for guidance."""
    keep = torch.rand(len(prompts) // per_clip, generator=generator) >= NO_CAPTION_SHARE
    return [prompt if keep[index // per_clip] else "" for index, prompt in enumerate(prompts)]


def drop_structure(control: Tensor, sigmas_BK: Tensor, config: ModelConfig, generator: torch.Generator) -> Tensor:
    """Every other chunk does without its structure, if its noise is light enough to see where things are: a camera's
    picture may come without."""
    keep = (torch.rand(sigmas_BK.shape, generator=generator) < 0.5).to(sigmas_BK.device)
    return control * per_frame((keep | (sigmas_BK > OUTLINES_SEEN)).float(), config)


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
    start: dict[str, Tensor] | None = None,
    *,
    sample: Sample | None = None,
    device: str = "cpu",
) -> Denoiser:
    """Train until the budget is spent; returns the average, frozen. start: weights of a `Denoiser`, all or some."""
    torch.manual_seed(2)
    teacher = Denoiser(config).to(device)
    trainer = Trainer("teacher", folder, teacher, settings)
    if trainer.step == 0 and start is not None:
        trainer.begin_with(start)
    compiled(teacher).train()

    gated = config.sampler.prediction == "gated"

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        generator = torch.Generator().manual_seed(step)
        alone = step % 3 == 0
        data, count = (openings, settings.openings) if alone else (clips, settings.clips)
        clean, prompts, known, control, movers = data.batch(step, count)
        sigmas = noise_levels(count, data.chunks, config.sampler.shift, generator).to(device)
        clean, control = clean.to(device), drop_structure(control.to(device), sigmas, config, generator)
        noise = torch.randn(clean.shape, generator=generator).to(device)
        prompts = drop_captions(prompts, data.chunks, generator)
        tokens, same = teacher.text.tokenize(prompts).to(device), unchanged(prompts, data.chunks).to(device)
        with torch.autocast(clean.device.type, dtype=torch.bfloat16):
            text = teacher.student.text_kv(teacher.text(tokens))
            past = imperfect_past(teacher, clean, text, control, config, generator, same)
            clean, stays = held(clean, past, config, same) if gated else (clean, None)
            noisy = mix(clean, noise, per_frame(sigmas, config))
            out = teacher_forced(teacher.student, past, noisy, sigmas, text, config, control).float()
        # The error of the flow; near the clean end a clean prediction's would count without bound.
        made = clean_chunks(out, past, noisy, sigmas, config, same)
        scale = per_frame(sigmas.clamp_min(SIGMA_FLOOR), config)
        weight = (per_frame(known, config) * (1 + MOVER_WEIGHT * movers[:, :, None])).to(device).expand_as(clean)
        error = (((made - clean) / scale).square() * weight).sum() / weight.sum()
        figures = {"opening" if alone else "clip": error.item()}
        if stays is None:
            return error, figures
        # Between two answers that are both nearly right, the error alone hardly moves a gate.
        # A stream's first frame has none before it.
        answers = out[:, 1:, -1:], stays[:, 1:].float()
        wrong = F.binary_cross_entropy_with_logits(*answers, weight=weight[:, 1:, :1])
        return error + GATE_WEIGHT * wrong, figures | {"gate": wrong.item()}

    trainer.fit(loss, sample and (lambda: sample(average(config, trainer), folder)))
    return average(config, trainer)


def average(config: ModelConfig, trainer: Trainer) -> Denoiser:
    """The EMA weights, frozen."""
    made = Denoiser(config)
    made.load_state_dict(trainer.ema.values)
    return made.eval().requires_grad_(False)
