"""Stage 1: the pocket autoencoder, on crops of the procedural world and of generic imagery."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from pipeline.codec import PocketCodec, frames_to_pixels, pixels_to_frames
from pipeline.config import ModelConfig
from pipeline.training import generic, world
from pipeline.training.footage import Footage
from pipeline.training.loop import Trainer, can_compile
from pipeline.training.settings import AutoencoderSettings
from pipeline.training.sheet import write_sheet

CROP_HEIGHT, CROP_WIDTH = 96, 160
LATENT_NOISE = 0.12


def item_rng(*key: int) -> np.random.Generator:
    """Counter-based: the same key draws the same numbers on any machine, in any order."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


class Crops(Dataset[Tensor]):
    """Item n is a pure function of (seed, n): uint8 (T, crop height, crop width, 3). footage: instead of the world."""

    def __init__(self, config: ModelConfig, seed: int, generic_share: float, footage: Footage | None = None) -> None:
        self.config, self.seed, self.generic_share, self.footage = config, seed, generic_share, footage

    def __len__(self) -> int:
        return 2**40

    def __getitem__(self, index: int) -> Tensor:
        rng = item_rng(self.seed, index)
        config = self.config
        count = 2 * config.codec.frames
        if self.footage is not None or rng.random() < self.generic_share:
            if self.footage is not None and rng.random() >= self.generic_share:
                clip, _ = self.footage.cut(rng, count)
            else:
                clip = generic.generic_clip(rng, count, config.width, config.height)
            top = int(rng.integers(0, config.height - CROP_HEIGHT + 1))
            left = int(rng.integers(0, config.width - CROP_WIDTH + 1))
        else:
            scene = replace(world.sample_scene(rng), free=bool(rng.random() < 0.5))
            times_s = rng.uniform(0, 600) + np.arange(count) / config.fps
            clip = world.render(scene, times_s, config.width, config.height)
            # Most crops hold the mover: the background is easy and the same everywhere.
            centre_x, centre_y = world.track(scene, times_s[:1], config.width, config.height)[0]
            jitter = rng.uniform(-0.5, 0.5, 2)
            left = int(np.clip(centre_x - CROP_WIDTH * (0.5 + jitter[0]), 0, config.width - CROP_WIDTH))
            top = int(np.clip(centre_y - CROP_HEIGHT * (0.5 + jitter[1]), 0, config.height - CROP_HEIGHT))
        return torch.from_numpy(clip[:, top : top + CROP_HEIGHT, left : left + CROP_WIDTH].copy())


def batches(dataset: Dataset[Tensor], batch: int, step: int) -> Iterator[Tensor]:
    loader = DataLoader(dataset, batch, sampler=range(batch * step, 2**40), num_workers=1, prefetch_factor=4)
    return iter(loader)


def as_frames(clips: Iterable[Tensor], device: str) -> Tensor:
    """uint8 THWC clips -> float frames_BTCHW on the device."""
    return torch.stack([pixels_to_frames(clip) for clip in clips]).to(device)


@torch.no_grad()
def start_from_principal_components(codec: PocketCodec, frames_BTCHW: Tensor) -> None:
    """Set the resampling layers so that the untrained codec is a chain of principal component projections.

    The residual branches are zero at the start, so encoder and decoder are linear; from this start training goes
    straight to detail, where a random one spends its first thousand steps on finding the colours.
    """

    def project(layer: nn.Module, features_BCHW: Tensor) -> Tensor:
        assert isinstance(layer, nn.Conv2d) and layer.bias is not None
        flat = features_BCHW.movedim(1, -1).flatten(0, -2).double()
        vectors = torch.linalg.eigh(flat.T @ flat).eigenvectors.flip(1)[:, : layer.out_channels].T.float()
        layer.weight.copy_(vectors[:, :, None, None])
        layer.bias.zero_()
        return vectors

    features = frames_BTCHW.unflatten(1, (-1, codec.config.frames)).flatten(0, 1).flatten(1, 2)
    found = []
    for layer in codec.encoder:
        if isinstance(layer, nn.Conv2d):
            found.append(project(layer, features))
        features = layer(features)
    mean, deviation = features.mean((0, 2, 3)), features.std((0, 2, 3))
    backward = [layer for layer in codec.decoder if isinstance(layer, nn.Conv2d)]
    for layer, vectors in zip(backward, reversed(found), strict=True):
        assert layer.bias is not None
        layer.weight.mul_(0.1)
        layer.bias.zero_()
        middle = layer.kernel_size[0] // 2
        layer.weight[:, :, middle, middle] = 0
        layer.weight[:, : len(vectors), middle, middle] = vectors.T
    # The decoder reads latents of unit deviation around zero.
    vectors = found[-1]
    middle = backward[0].kernel_size[0] // 2
    backward[0].weight[:, : len(vectors), middle, middle] = vectors.T * deviation
    assert backward[0].bias is not None
    backward[0].bias.copy_(vectors.T @ mean)
    codec.normalise.running_mean.copy_(mean)  # type: ignore[union-attr]
    codec.normalise.running_var.copy_(deviation.square())  # type: ignore[union-attr]


@torch.no_grad()
def balance(codec: PocketCodec, frames_BTCHW: Tensor, power: float = 1.0) -> None:
    """Scale each channel by what it moves in the picture, mean square 1.

    Unit channels would give fine detail and layout one weight: the denoiser would spend its capacity on detail and lose
    the layout first. power: 0 leaves unit channels, 1 makes an error in latents an error in pixels.
    """
    generator = torch.Generator().manual_seed(0)
    codec.scale.fill_(1.0)
    latents = codec.encode(frames_BTCHW)
    still = codec.decode(latents)
    moved = torch.zeros(latents.shape[2])
    for channel in range(len(moved)):
        nudged = latents.clone()
        nudged[:, :, channel] += 0.3 * torch.randn(nudged[:, :, channel].shape, generator=generator)
        moved[channel] = (codec.decode(nudged) - still).square().mean().sqrt()
    scale = moved.pow(power)
    codec.scale.copy_((scale / scale.square().mean().sqrt())[:, None, None])


def reconstruction_loss(made: Tensor, real: Tensor) -> Tensor:
    """L1 plus a squared term on pixels, and L1 on differences across x, y and t: sharp edges and a quiet background."""
    error = made - real
    across = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean() + error.diff(dim=1).abs().mean()
    return error.abs().mean() + 4 * error.square().mean() + 0.25 * across


def train_autoencoder(
    config: ModelConfig,
    folder: Path,
    settings: AutoencoderSettings,
    footage: Footage | None = None,
    start: PocketCodec | None = None,
    *,
    seed: int = 1,
    device: str = "cpu",
) -> PocketCodec:
    """Train until the budget is spent; returns the EMA codec in eval mode.

    start: a codec to begin with; without one, the first step begins with principal components.
    """
    if settings.keep and start is not None:
        return start
    codec = PocketCodec(config.codec).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    trainer = Trainer("autoencoder", folder, codec, settings)
    stream = batches(
        Crops(config, seed, settings.generic_share, footage), settings.batch, trainer.step * settings.accumulate
    )
    if trainer.step == 0 and start is not None:
        trainer.begin_with(start.state_dict() | {"scale": torch.ones_like(start.scale)})
    elif trainer.step == 0:
        start_from_principal_components(codec, as_frames(next(stream), device))
    codec.train()
    if can_compile():
        codec.encoder.compile()
        codec.decoder.compile()

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        real = as_frames(next(stream), device)
        noise = torch.Generator().manual_seed(step)
        with torch.autocast(real.device.type, dtype=torch.bfloat16):
            latents = codec.encode(real)
            # The sampler's last step leaves small errors; the decoder learns to shrug them off.
            size = torch.rand(len(latents), 1, 1, 1, 1, generator=noise) * LATENT_NOISE
            made = codec.decode(latents + (size * torch.randn(latents.shape, generator=noise)).to(device))
        made = made.float()
        psnr_db = 10 * torch.log10(4 / F.mse_loss(made, real)).item()
        return reconstruction_loss(made, real), {"psnr_db": psnr_db}

    def sample() -> Path:
        average = load_average(PocketCodec(config.codec), trainer)
        real = as_frames(next(stream), "cpu")
        with torch.no_grad():
            made = average.decode(average.encode(real))
        rows = [
            [frames_to_pixels(clip[index])[[0, 3, 7]].numpy() for clip in (real, made)] for index in range(len(real))
        ]
        write_sheet(folder / "sample.png", [[frame for clip in row for frame in clip] for row in rows])
        return folder / "sample.png"

    trainer.fit(loss, sample)
    average = load_average(PocketCodec(config.codec), trainer)
    others = Crops(config, seed + 1, settings.generic_share, footage)
    balance(average, as_frames([others[index] for index in range(48)], "cpu"))
    return average


def load_average(module: PocketCodec, trainer: Trainer) -> PocketCodec:
    module.load_state_dict(trainer.ema.values)
    return module.eval().requires_grad_(False)
