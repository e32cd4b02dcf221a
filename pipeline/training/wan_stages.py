"""What a Wan model learns on encoded clips: flow matching with teacher forcing, then few steps from a guided teacher.

The losses of the pocket student (`teacher.py`, `student.py`), but for the past, which is noised and never drawn by the
model. Prompts are embeddings already, and all noise is drawn clip by clip, so that it does not matter how many
processes share a batch. Knows nothing of files.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pipeline.config import ModelConfig
from pipeline.sampler import guide, levels, mix
from pipeline.student import Student
from pipeline.training.forcing import clean_chunks, for_both, forced, per_frame
from pipeline.training.loop import Loss
from pipeline.training.parallel import Ranks
from pipeline.training.precomputed import Batch, Precomputed
from pipeline.training.settings import WanStageSettings
from pipeline.training.student import PART_WAY_LOWEST, Said, guided_end
from pipeline.training.teacher import NO_CAPTION_SHARE, SIGMA_FLOOR, noise_levels, noised_past

Noise = Callable[[], Tensor]


class TextInLayer(Sequence[tuple[Tensor, Tensor]]):
    """Cross-attention keys and values, made inside the layer that asks: only there are its weights whole."""

    def __init__(self, student: Student, text_BLD: Tensor, past: int) -> None:
        self.student, self.text, self.past = student, text_BLD, past

    def __len__(self) -> int:
        return len(self.student.model.blocks)

    def __getitem__(self, layer: int) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        key, value = self.student.layer_text(layer, self.text)
        return for_both(key, self.past), for_both(value, self.past)


class Forced(nn.Module):
    """A teacher-forced pass as one module, which is what FSDP takes for its root: from embeddings to clean latents."""

    def __init__(self, student: Student, config: ModelConfig) -> None:
        super().__init__()
        self.student, self.config = student, config

    def forward(self, past_BTCHW: Tensor, noisy_BTCHW: Tensor, sigmas_BK: Tensor, text_BKLD: Tensor) -> Tensor:
        model, config = self.student.model, self.config
        kind = model.patch_embedding.weight.dtype
        text = model.condition_embedder.text_embedder(text_BKLD.flatten(0, 1).to(kind))
        laid_out = TextInLayer(self.student, text, sigmas_BK.shape[1] - 1)
        out = forced(self.student, past_BTCHW.to(kind), noisy_BTCHW.to(kind), sigmas_BK, laid_out, config)
        return clean_chunks(out.float(), past_BTCHW, noisy_BTCHW, sigmas_BK, config)


def teaching(model: Forced, data: Precomputed, settings: WanStageSettings, ranks: Ranks) -> Loss:
    """Flow matching with a level per chunk, on a slightly noised past; some clips lose their prompt, for guidance."""
    config, device = model.config, ranks.device

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        batch = data.batch(step, settings.batch, rank=ranks.rank, ranks=ranks.count)
        sigmas = batch.drawn(lambda _, of: noise_levels(1, data.chunks, config.sampler.shift, of)).to(device)
        noise = noise_of(batch, device)()
        past = batch.drawn(noised_past).to(device)
        keep = batch.drawn(lambda _, of: torch.rand(1, 1, 1, 1, generator=of) >= NO_CAPTION_SHARE)
        text = torch.where(keep, batch.text_BKLD, data.unprompted_LD).to(device)
        clean = batch.latents_BTCHW.to(device)
        made = model(past, mix(clean, noise, per_frame(sigmas, config)), sigmas, text)
        # The error of the flow; near the clean end a clean prediction's would count without bound.
        return ((made - clean) / per_frame(sigmas.clamp_min(SIGMA_FLOOR), config)).square().mean(), {}

    return loss


def distilling(model: Forced, teacher: Forced, data: Precomputed, settings: WanStageSettings, ranks: Ranks) -> Loss:
    """Each pass meets what it will meet at inference, and learns where the teacher's guided walk from there ends.

    One turn in five starts part-way from a real clip, as a stream that follows a webcam does.
    """
    config, device = model.config, ranks.device
    sigmas = levels(config.sampler)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        batch = data.batch(step + 10**6, settings.batch, rank=ranks.rank, ranks=ranks.count)
        clean, text = batch.latents_BTCHW.to(device), batch.text_BKLD.to(device)
        bare = data.unprompted_LD.to(device).expand_as(text)
        past, noise = batch.drawn(noised_past).to(device), noise_of(batch, device)
        turn = step % (len(sigmas) + 1)
        part_way = torch.rand((), generator=torch.Generator().manual_seed(step)).item()
        part_way = PART_WAY_LOWEST + (1 - PART_WAY_LOWEST) * part_way
        passes = sigmas[: turn + 1] if turn < len(sigmas) else [part_way]

        def says(who: Forced, text: Tensor) -> Said:
            return lambda noisy, sigma: who(past, noisy, torch.full(text.shape[:2], sigma, device=device), text)

        with torch.no_grad():
            latents = clean
            for sigma in passes[:-1]:
                latents = says(model, text)(mix(latents, noise(), sigma), sigma)
            noisy = mix(latents, noise(), passes[-1])
            told, free = says(teacher, text), says(teacher, bare)
            own = says(model, text) if settings.target == "consistency" else None

            def guided(noisy: Tensor, sigma: float) -> Tensor:
                return guide("clean", told(noisy, sigma), free(noisy, sigma), settings.guidance)

            target = guided_end(guided, noisy, passes[-1], config.sampler.shift, own)
        made = says(model, text)(noisy, passes[-1])
        error = (made - target).square().unflatten(1, (-1, config.chunk)).mean((2, 3, 4, 5))
        name = f"pass_{turn}" if turn < len(sigmas) else "part_way"
        return (error + 1e-3).sqrt().mean(), {name: error.mean().item()}

    return loss


def noise_of(batch: Batch, device: torch.device) -> Noise:
    """Fresh unit noise at each call, for each clip from its own generator."""
    return lambda: batch.drawn(lambda clip, of: torch.randn(clip.shape, generator=of)).to(device)
