"""Stage 3: the few-step student, by distilling where the teacher's guided trajectories end.

Each of the student's passes is trained on what it meets at inference: the passes before it are run first, on the same
noise schedule, and their answer is noised again; the past of a share of the clips is what the student itself streamed,
long after its first chunk, and the prompt may just have changed. From that very point the frozen teacher walks down its
guided trajectory in small Euler steps, and the student learns to name the end in one pass. Who names the target is a
setting: the teacher alone, all the way down, so that nothing the student says can pull it away; or the teacher for a
few steps and then the student itself (consistency), which costs a fraction and is anchored where the last walks end.
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
from pipeline.sampler import Anchor, guide, levels, mix, shifted
from pipeline.student import TextKV
from pipeline.training.clips import Clips
from pipeline.training.forcing import clean_chunks, teacher_forced
from pipeline.training.loop import Trainer
from pipeline.training.rollout import roll_out_clip
from pipeline.training.settings import StudentSettings
from pipeline.training.teacher import (
    MOVER_WEIGHT,
    Denoiser,
    Sample,
    average,
    compiled,
    drop_structure,
    imperfect_past,
    unchanged,
)

MOVED = 0.3  # root mean square of a cell's channels: what moved that far from the frame before counts as a mover
WALK_STEPS = 8
CONSISTENT_STEPS = 2  # of a walk's steps: from one of four levels to the next
PART_WAY_LOWEST = 0.2

Said = Callable[[Tensor, float], Tensor]


def walk(sigma: float, shift: float) -> list[float]:
    """The levels of a walk from sigma to 0: evenly spaced before the shift, fewer from lower starts."""
    position = sigma / (shift - (shift - 1) * sigma)
    steps = max(2, round(WALK_STEPS * position))
    return [*(shifted(position * (1 - step / steps), shift) for step in range(steps)), 0.0]


def guided_end(guided: Said, noisy: Tensor, sigma: float, shift: float, named: Said | None = None) -> Tensor:
    """Where the teacher's guided trajectory through `noisy` ends.

    guided: the clean latents that the teacher names, led by its words. named: who tells the end after the teacher's
    first `CONSISTENT_STEPS` steps; None: nobody, the teacher goes all the way.
    """
    steps = list(itertools.pairwise(walk(sigma, shift)))
    for high, low in steps if named is None else steps[:CONSISTENT_STEPS]:
        clean = guided(noisy, high)
        noisy = clean + low / high * (noisy - clean)
    return noisy if named is None or low == 0 else named(noisy, low)


def changing(prompts: list[str], per_clip: int, generator: torch.Generator) -> list[str]:
    """Every other clip's prompts, with those of the clip after it from some chunk on, but the first."""
    clips = [prompts[at : at + per_clip] for at in range(0, len(prompts), per_clip)]
    borders = torch.randint(1, per_clip, (len(clips),), generator=generator).tolist()
    others = [*clips[1:], clips[0]]
    changed = [
        clip[:border] + other[:1] * (per_clip - border) if place % 2 == 0 else clip
        for place, (clip, other, border) in enumerate(zip(clips, others, borders, strict=True))
    ]
    return [prompt for clip in changed for prompt in clip]


def rolled_past(
    denoiser: Denoiser,
    words: Tensor,
    known: Tensor,
    longest: int,
    config: ModelConfig,
    generator: torch.Generator,
    same_BK: Tensor,
) -> tuple[Tensor, Tensor]:
    """Clips as the student streams them, of lengths up to `longest` chunks, short ones more often; and which of their
    chunks can be told from those before them in the clip."""
    count, chunks = known.shape
    share = torch.rand((), generator=generator).item()
    longer = round((longest - chunks + 1) ** share) - 1
    seeds = torch.randint(2**31, (count,), generator=generator).tolist()
    passes = [len(levels(config.sampler))] * (chunks + longer)
    known = torch.ones_like(known)
    known[:, 1] = float(longer == 0)
    return roll_out_clip(denoiser.student, words, seeds, passes, longer, config, (), same_BK), known


def moved(past: Tensor, target: Tensor, config: ModelConfig) -> Tensor:
    """Cells that the target changes from the past's last frame before each chunk, (B, T, h, w), of 0 and 1."""
    each = config.chunk
    last = past[:, each - 1 : -each : each].repeat_interleave(each, 1)
    far = (target[:, each:] - last).square().mean(2).sqrt() > MOVED
    return torch.cat([torch.zeros_like(far[:, :each]), far], 1).float().cpu()


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
    sigmas, kind = levels(config.sampler), config.sampler.prediction
    late = [place for place, sigma in enumerate(sigmas) if sigma <= config.sampler.anchored]  # the anchored passes

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        generator = torch.Generator().manual_seed(step)
        # One turn in five starts part-way from a real picture, as a webcam stream does.
        opening, turn = step % 2 == 0, step // 2 % (len(sigmas) + 1)
        if late and torch.rand((), generator=generator) < settings.anchored:
            opening, turn = False, late[int(torch.randint(len(late), (), generator=generator))]
        data, count = (openings, settings.openings) if opening else (clips, settings.clips)
        clean, prompts, known, control, movers = data.batch(step + 10**6, count)
        clean, control, rolled = clean.to(device), control.to(device), False
        part_way = PART_WAY_LOWEST + (1 - PART_WAY_LOWEST) * torch.rand((), generator=generator).item()
        passes = sigmas[: turn + 1] if turn < len(sigmas) else [part_way]
        anchor = Anchor(config.sampler, on=turn < len(sigmas) and data.chunks > 1)
        anchored = anchor.holds(passes[-1])
        if anchored:
            control = torch.zeros_like(control)
            # Every other such batch is the truth, noised to any level: what earlier passes make of it is a little off.
            if torch.rand((), generator=generator) < 0.5:
                share = torch.rand((), generator=generator).item()
                passes = [PART_WAY_LOWEST + (config.sampler.anchored - PART_WAY_LOWEST) * share]
        elif turn < len(sigmas) and not opening and torch.rand((), generator=generator) < settings.rolled:
            rolled, prompts, control = True, changing(prompts, data.chunks, generator), torch.zeros_like(control)
        tokens, bare_tokens = (teacher.text.tokenize(texts).to(device) for texts in (prompts, [""] * len(prompts)))
        same = unchanged(prompts, data.chunks).to(device)
        if turn == len(sigmas):
            levels_BK = torch.full(known.shape, part_way, device=device)
            control = drop_structure(control, levels_BK, config, generator)

        def noised(latents: Tensor, sigma: float) -> Tensor:
            return mix(latents, torch.randn(clean.shape, generator=generator).to(device), sigma)

        def put_out(who: Denoiser, text: TextKV, noisy: Tensor, sigma: float) -> Tensor:
            sigmas_BK, alone = torch.full(known.shape, sigma, device=device), anchor.holds(sigma)
            return teacher_forced(who.student, past, noisy, sigmas_BK, text, config, control, anchored=alone).float()

        def clean_of(out: Tensor, noisy: Tensor, sigma: float) -> Tensor:
            return clean_chunks(out, past, noisy, torch.full(known.shape, sigma, device=device), config, same)

        def own(noisy: Tensor, sigma: float) -> Tensor:
            return clean_of(anchor.keep(put_out(denoiser, text, noisy, sigma), sigma), noisy, sigma)

        def guided(noisy: Tensor, sigma: float) -> Tensor:
            told, free = (put_out(teacher, each, noisy, sigma) for each in (named, bare))
            return clean_of(guide(kind, told, free, settings.guidance), noisy, sigma)

        def aim(noisy: Tensor, sigma: float) -> Tensor:
            if settings.target == "start":
                return clean_of(put_out(teacher, named, noisy, sigma), noisy, sigma)
            return guided_end(
                guided, noisy, sigma, config.sampler.shift, own if settings.target == "consistency" else None
            )

        with torch.autocast(clean.device.type, dtype=torch.bfloat16):
            with torch.no_grad():
                words = denoiser.text(tokens)
                named, bare = (teacher.student.text_kv(each) for each in (words, teacher.text(bare_tokens)))
                text, latents = denoiser.student.text_kv(words), clean
                if rolled:
                    past, known = rolled_past(denoiser, words, known, settings.longest, config, generator, same)
                else:
                    past = imperfect_past(denoiser, clean, text, control, config, generator, same)
                for sigma in passes[:-1]:
                    latents = own(noised(latents, sigma), sigma)
                noisy = noised(latents, passes[-1])
                if anchored:  # all but a stream's opening, which is its sink; the gate is an earlier pass's
                    target, known = clean, torch.ones_like(known)
                    known[:, 0] = 0
                else:
                    target = aim(noisy, passes[-1])
                if rolled:
                    movers = moved(past, target, config)
            text = denoiser.student.text_kv(words)
            if anchored:
                out = put_out(denoiser, text, noisy, passes[-1])
                made = out[:, :, :-1] if kind == "gated" else clean_of(out, noisy, passes[-1])
            else:
                made = own(noisy, passes[-1])
        heavy = (1 + MOVER_WEIGHT * movers[:, :, None]).to(device).expand_as(clean)
        parts = ((made - target).square() * heavy, heavy)
        squares, weights = (part.unflatten(1, (-1, config.chunk)).sum((2, 3, 4, 5)) for part in parts)
        error, weight = squares / weights, known.to(device)
        value = ((error + 1e-3).sqrt() * weight).sum() / weight.sum()
        name = f"pass_{turn}" if turn < len(sigmas) else "part_way"
        name = f"anchored_{turn}" if anchored else name
        return value, {name: (error * weight).sum().item() / weight.sum().item()}

    trainer.fit(loss, sample and (lambda: sample(average(config, trainer), folder)))
    return average(config, trainer)
