"""Stage 3: the few-step student, by causal consistency distillation of the guided teacher.

On one trajectory of the teacher, every level must lead to the same clean latents: the student at level n is pulled to
what it says at level n - 1, which the teacher reaches from n in one guided Euler step. The past is the true one,
noised, under the same positions and the same cache rule as at inference.
Source: consistency models (Song et al. 2023) with classifier-free guidance inside (LCM, Luo et al. 2023), on flow
matching, chunk by chunk.
"""

from pathlib import Path

import torch
from torch import Tensor

from pipeline.config import ModelConfig
from pipeline.sampler import clean_from, mix, shifted
from pipeline.training.clips import CHUNKS, Clips
from pipeline.training.forcing import teacher_forced
from pipeline.training.loop import StageSettings, Trainer
from pipeline.training.teacher import Denoiser, average, compiled, noised_past, per_frame

LEVELS = 24
GUIDANCE = 2.5


def train_student(
    config: ModelConfig,
    clips: Clips,
    teacher: Denoiser,
    folder: Path,
    settings: StageSettings,
    *,
    batch: int = 8,
    device: str = "cpu",
) -> Denoiser:
    """Distil until the budget is spent; the text encoder stays the teacher's."""
    denoiser = Denoiser(config).to(device)
    teacher = teacher.to(device)
    denoiser.load_state_dict(teacher.state_dict())
    denoiser.text.requires_grad_(False)
    prediction = config.sampler.prediction
    trainer = Trainer("student", folder, denoiser, settings)
    compiled(denoiser).train()
    compiled(teacher)
    table = torch.tensor([shifted(place / LEVELS, config.sampler.shift) for place in range(LEVELS + 1)]).to(device)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        generator = torch.Generator().manual_seed(step)
        clean, prompts = clips.batch(step + 10**6, batch)
        place = torch.randint(1, LEVELS + 1, (batch, CHUNKS), generator=generator).to(device)
        high, low = table[place], table[place - 1]
        clean, noise = clean.to(device), torch.randn(clean.shape, generator=generator).to(device)
        past = noised_past(clean, generator)
        noisy = mix(clean, noise, per_frame(high, config))
        tokens, bare_tokens = (teacher.text.tokenize(texts).to(device) for texts in (prompts, [""] * len(prompts)))
        with torch.autocast(clean.device.type, dtype=torch.bfloat16):
            with torch.no_grad():
                named, bare = (teacher.student.text_kv(teacher.text(each)) for each in (tokens, bare_tokens))
                told = teacher_forced(teacher.student, past, noisy, high, named, config).float()
                free = teacher_forced(teacher.student, past, noisy, high, bare, config).float()
                out = free + GUIDANCE * (told - free)
                guided = clean_from(prediction, out, noisy, per_frame(high, config))
                # One Euler step along the line from noise to the guided clean latents.
                nearer = guided + per_frame(low / high, config) * (noisy - guided)
                text = denoiser.student.text_kv(denoiser.text(tokens))
                out = teacher_forced(denoiser.student, past, nearer, low, text, config).float()
                said = clean_from(prediction, out, nearer, per_frame(low, config))
                target = torch.where(per_frame(low, config) > 0, said, nearer)
            text = denoiser.student.text_kv(denoiser.text(tokens))
            out = teacher_forced(denoiser.student, past, noisy, high, text, config).float()
        made = clean_from(prediction, out, noisy, per_frame(high, config))
        error = (made - target).square().mean((2, 3, 4))
        return (error + 1e-3).sqrt().mean(), {"squared": error.mean().item()}

    trainer.fit(loss)
    return average(config, trainer)
