"""Stage 3: the few-step student, by distilling where the teacher's guided trajectories end.

Each of the student's passes is trained on what it meets at inference: the passes before it are run first, on the same
noise schedule, and their answer is noised again. From that very point the frozen teacher walks down its guided
trajectory in small Euler steps, and the student learns to name the end in one pass. Who names the target is a setting:
the teacher alone, all the way down, so that nothing the student says can pull it away; or the teacher for a few steps
and then the student itself (consistency), which costs a fraction and is anchored where the last walks end.
Source: knowledge distillation of samplers (Luhman and Luhman 2021) with classifier-free guidance inside (Meng et al.
2023), gathered on the student's own trajectory (DAgger, Ross et al. 2011), on flow matching, chunk by chunk;
consistency distillation (Song et al. 2023) from the online weights (Song and Dhariwal 2024).
"""

import itertools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from pipeline.config import ModelConfig
from pipeline.sampler import clean_from, levels, mix, shifted
from pipeline.student import TextKV
from pipeline.training.clips import Clips
from pipeline.training.forcing import teacher_forced
from pipeline.training.loop import Trainer
from pipeline.training.settings import StudentSettings
from pipeline.training.teacher import MOVER_WEIGHT, Denoiser, Sample, average, compiled, drop_structure, imperfect_past

WALK_STEPS = 8
CONSISTENT_STEPS = 2  # of a walk's steps: from one of four levels to the next
PART_WAY_LOWEST = 0.2

Said = Callable[[Tensor, float], Tensor]


def clean_said(
    denoiser: Denoiser,
    past: Tensor,
    noisy: Tensor,
    sigma: float,
    text: TextKV,
    control: Tensor,
    config: ModelConfig,
) -> Tensor:
    """The clean latents that a denoiser names for every chunk at one level."""
    chunks = noisy.shape[1] // config.chunk
    sigmas = torch.full((len(noisy), chunks), sigma, device=noisy.device)
    out = teacher_forced(denoiser.student, past, noisy, sigmas, text, config, control).float()
    return clean_from(config.sampler.prediction, out, noisy, sigma)


def walk(sigma: float, shift: float) -> list[float]:
    """The levels of a walk from sigma to 0: evenly spaced before the shift, fewer from lower starts."""
    position = sigma / (shift - (shift - 1) * sigma)
    steps = max(2, round(WALK_STEPS * position))
    return [*(shifted(position * (1 - step / steps), shift) for step in range(steps)), 0.0]


def guided_end(
    told: Said, free: Said, noisy: Tensor, sigma: float, shift: float, guidance: float, named: Said | None = None
) -> Tensor:
    """Where the teacher's guided trajectory through `noisy` ends.

    told, free: what the teacher says with words and without; it is led from this through that. named: who tells the end
    after the teacher's first `CONSISTENT_STEPS` steps; None: nobody, the teacher goes all the way.
    """
    steps = list(itertools.pairwise(walk(sigma, shift)))
    for high, low in steps if named is None else steps[:CONSISTENT_STEPS]:
        start = free(noisy, high)
        guided = start + guidance * (told(noisy, high) - start)
        noisy = guided + low / high * (noisy - guided)
    return noisy if named is None or low == 0 else named(noisy, low)


def train_student(
    config: ModelConfig,
    openings: Clips,
    clips: Clips,
    teacher: Denoiser,
    folder: Path,
    settings: StudentSettings,
    *,
    sample: Sample | None = None,
    device: str = "cpu",
) -> Denoiser:
    """Distil until the budget is spent; the text encoder stays the teacher's."""
    denoiser = Denoiser(config).to(device)
    teacher = teacher.to(device)
    denoiser.load_state_dict(teacher.state_dict())
    denoiser.text.requires_grad_(False)
    trainer = Trainer("student", folder, denoiser, settings)
    compiled(denoiser).train()
    compiled(teacher)
    sigmas, consistent = levels(config.sampler), settings.target == "consistency"

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        generator = torch.Generator().manual_seed(step)
        data, count = (openings, settings.openings) if step % 2 == 0 else (clips, settings.clips)
        clean, prompts, known, control, movers = data.batch(step + 10**6, count)
        clean, control = clean.to(device), control.to(device)
        tokens, bare_tokens = (teacher.text.tokenize(texts).to(device) for texts in (prompts, [""] * len(prompts)))
        # One turn in five starts part-way from a real picture, as a webcam stream does.
        turn = step // 2 % (len(sigmas) + 1)
        part_way = PART_WAY_LOWEST + (1 - PART_WAY_LOWEST) * torch.rand((), generator=generator).item()
        passes = sigmas[: turn + 1] if turn < len(sigmas) else [part_way]
        if turn == len(sigmas):
            levels_BK = torch.full(known.shape, part_way, device=device)
            control = drop_structure(control, levels_BK, config, generator)

        def noised(latents: Tensor, sigma: float) -> Tensor:
            return mix(latents, torch.randn(clean.shape, generator=generator).to(device), sigma)

        with torch.autocast(clean.device.type, dtype=torch.bfloat16):
            with torch.no_grad():
                words = denoiser.text(tokens)
                named, bare = (teacher.student.text_kv(each) for each in (words, teacher.text(bare_tokens)))
                text, latents = denoiser.student.text_kv(words), clean
                past = imperfect_past(denoiser, clean, text, control, config, generator)

                def says(who: Denoiser, text: TextKV) -> Said:
                    return lambda noisy, sigma: clean_said(who, past, noisy, sigma, text, control, config)

                for sigma in passes[:-1]:
                    latents = says(denoiser, text)(noised(latents, sigma), sigma)
                noisy = noised(latents, passes[-1])
                told, free, own = says(teacher, named), says(teacher, bare), says(denoiser, text)
                target = guided_end(
                    told, free, noisy, passes[-1], config.sampler.shift, settings.guidance, own if consistent else None
                )
            text = denoiser.student.text_kv(words)
            made = clean_said(denoiser, past, noisy, passes[-1], text, control, config)
        heavy = (1 + MOVER_WEIGHT * movers[:, :, None]).to(device).expand_as(clean)
        parts = ((made - target).square() * heavy, heavy)
        squares, weights = (part.unflatten(1, (-1, config.chunk)).sum((2, 3, 4, 5)) for part in parts)
        error, weight = squares / weights, known.to(device)
        value = ((error + 1e-3).sqrt() * weight).sum() / weight.sum()
        name = f"pass_{turn}" if turn < len(sigmas) else "part_way"
        return value, {name: (error * weight).sum().item() / weight.sum().item()}

    trainer.fit(loss, sample and (lambda: sample(average(config, trainer), folder)))
    return average(config, trainer)
