"""Stage 4: self-forcing distribution matching. The student is scored on what it really makes, drift and all.

It rolls out whole streams from noise with its own cache. Every scored chunk is noised again, and two denoisers say
what was there: the frozen teacher, guided, and a critic that learns what the student's own pictures look like. Where
they differ, the student is moved towards the teacher. Long rollouts are scored on the sink and the window alone, as
the cache would remember them, so a stream of any length costs one clip.
Source: distribution matching distillation (Yin et al. 2024) on self-generated pasts (Self-Forcing, Huang et al. 2025).
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.config import ModelConfig
from pipeline.sampler import guide, levels, mix
from pipeline.training.clips import CHUNKS, Clips
from pipeline.training.forcing import clean_chunks, per_frame, said, teacher_forced
from pipeline.training.loop import Trainer
from pipeline.training.rollout import roll_out_clip
from pipeline.training.settings import MatchingSettings
from pipeline.training.teacher import SIGMA_FLOOR, Denoiser, Sample, compiled, noise_levels, unchanged

LOWEST, HIGHEST = 0.05, 0.98
WHOLE_SHARE = 0.25  # of the later chunks of a rollout that holds tiles


class Pair(nn.Module):
    """The student and its critic. Their losses share no weights, so one backward pass and one optimizer serve both."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.student, self.critic = Denoiser(config), Denoiser(config)

    def hidden_matrices(self) -> Iterator[nn.Parameter]:
        yield from self.student.hidden_matrices()
        yield from self.critic.hidden_matrices()


def towards_the_teacher(made: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """A loss whose gradient at `made` is the normalised difference of what critic and teacher see in it.

    made, real, fake: (B, T, C, h, w); the gradient has about unit size in each chunk, however noisy the question was.
    """
    size = (made.detach() - real).abs().mean((1, 2, 3, 4), keepdim=True).clamp_min(1e-3)
    goal = made.detach() - (fake - real) / size
    return 0.5 * (made - goal).square().mean()


def train_matching(
    config: ModelConfig,
    clips: Clips,
    teacher: Denoiser,
    student: Denoiser,
    folder: Path,
    settings: MatchingSettings,
    *,
    sample: Sample | None = None,
    device: str = "cpu",
) -> Denoiser:
    """Tune until the budget is spent. clips: only their captions are used, with the changes of scene in them."""
    pair = Pair(config).to(device)
    pair.student.load_state_dict(student.state_dict())
    pair.critic.load_state_dict(teacher.state_dict())
    for denoiser in (pair.student, pair.critic):
        denoiser.text.requires_grad_(False)
    teacher = teacher.to(device)
    trainer = Trainer("matching", folder, pair, settings)
    for denoiser in (pair.student, pair.critic, teacher):
        compiled(denoiser)
    pair.train()
    streams, most = settings.streams, len(levels(config.sampler))

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        generator = torch.Generator().manual_seed(step)
        _, prompts, *_ = clips.batch(step + 2 * 10**6, streams)
        same = unchanged(prompts, CHUNKS).to(device)
        words = pair.student.text(pair.student.text.tokenize(prompts).to(device))
        bare = teacher.text(teacher.text.tokenize([""] * len(prompts)).to(device))
        seeds = torch.randint(2**31, (streams,), generator=generator).tolist()
        longer = int(torch.randint(settings.longest - CHUNKS + 1, (), generator=generator)) if step % 2 else 0
        passes = torch.randint(1, most + 1, (CHUNKS + longer,), generator=generator)
        passes[1 : 1 + longer] = most
        masks: list[np.ndarray | None] = []
        if config.tiles is not None and torch.rand((), generator=generator) < settings.held:
            masks, passes[:] = random_masks(config.tiles, len(passes), generator), most
        seen = same.clone()
        if longer:  # the chunk before it is not in the clip, so no gate may let that one through
            seen[:, 1] = False
        learns = step >= settings.critic_alone
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
            with torch.set_grad_enabled(learns):
                made = roll_out_clip(pair.student.student, words, seeds, passes.tolist(), longer, config, masks, same)
            past = made.detach()
            sigmas = noise_levels(streams, CHUNKS, config.sampler.shift, generator).clamp(LOWEST, HIGHEST).to(device)
            noisy = mix(past, torch.randn(past.shape, generator=generator).to(device), per_frame(sigmas, config))
            fake = said(
                pair.critic.student, past, noisy, sigmas, pair.critic.student.text_kv(words), config, None, seen
            )
            scale = per_frame(sigmas.clamp_min(SIGMA_FLOOR), config)
            critic_loss = ((fake - past) / scale).square().mean()
            if not learns:
                return critic_loss, {"critic": critic_loss.item()}
            with torch.no_grad():
                texts = (teacher.student.text_kv(each) for each in (words, bare))
                told, free = (
                    teacher_forced(teacher.student, past, noisy, sigmas, text, config).float() for text in texts
                )
                out = guide(config.sampler.prediction, told, free, settings.guidance)
                real = clean_chunks(out, past, noisy, sigmas, config, seen)
        grouped = (part.unflatten(1, (CHUNKS, -1)).flatten(0, 1) for part in (made, real, fake.detach()))
        student_loss = towards_the_teacher(*grouped)
        return critic_loss + student_loss, {"critic": critic_loss.item(), "student": student_loss.item()}

    def tuned() -> Denoiser:
        made = Pair(config)
        made.load_state_dict(trainer.ema.values)
        return made.student.eval().requires_grad_(False)

    trainer.fit(loss, sample and (lambda: sample(tuned(), folder)))
    return tuned()


def random_masks(tiles: tuple[int, int], chunks: int, generator: torch.Generator) -> list[np.ndarray | None]:
    """Which tiles are computed in each chunk: a box somewhere, or, in the first chunk and one of four, all of them."""

    def span(length: int) -> slice:
        size = int(torch.randint(max(1, length // 3), length + 1, (), generator=generator))
        start = int(torch.randint(length - size + 1, (), generator=generator))
        return slice(start, start + size)

    masks: list[np.ndarray | None] = []
    for _ in range(chunks):
        mask_HW = np.zeros(tiles, bool)
        mask_HW[span(tiles[0]), span(tiles[1])] = True
        whole = not masks or torch.rand((), generator=generator) < WHOLE_SHARE
        masks.append(None if whole else mask_HW)
    return masks
