"""What the attribute probe sees: eight small pictures, a quarter of a second apart, of one mover in the world.

It knows how to shrink a clip, how to draw clips whose words and centres are known, and how to spoil them a little: a
generated picture is softer and a shade off, and the probe has to read it all the same. It knows nothing of networks.
"""

from collections.abc import Iterator
from dataclasses import replace

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipeline.config import ModelConfig
from pipeline.training import world
from pipeline.training.autoencoder import item_rng

FRAMES, STRIDE = 8, 4
HEIGHT, WIDTH = 96, 160
TIME_LIMIT_S = 60.0
SPOILT_SHARE = 0.75
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "subject": world.SUBJECTS,
    "colour": world.COLOURS,
    "motion": world.MOTIONS,
    "speed": world.SPEEDS,
    "place": world.PLACES,
    "style": world.STYLES,
}
Item = tuple[Tensor, Tensor, Tensor]


def shrink(frames_THWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pictures of any size -> uint8 (T, 96, 160, 3), each pixel the mean of the area it covers."""
    return np.stack([cv2.resize(frame, (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA) for frame in frames_THWC])


def view(frames_THWC: NDArray[np.uint8], stride: int = STRIDE) -> Tensor:
    """The clip as the probe takes it, uint8 (8, 3, 96, 160): every `stride`-th of 8 * stride pictures.

    Subject, colour, place and style may be read at any stride, so from a single chunk too; motion and speed only at 4.
    """
    assert len(frames_THWC) == FRAMES * stride, f"{len(frames_THWC)} pictures are not {FRAMES} times {stride}"
    return torch.from_numpy(shrink(frames_THWC[::stride])).permute(0, 3, 1, 2).contiguous()


def view_times_s(config: ModelConfig, start_s: float) -> NDArray[np.float64]:
    """When the pictures of a view were taken, (8,), for a clip that begins at start_s."""
    return start_s + np.arange(FRAMES) * STRIDE / config.fps


def spoil(frames_THWC: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Softer, a little noisy, a shade lighter, darker or paler. The hue stays: it is what a colour is called by."""
    frames = frames_THWC.astype(np.float32)
    sigma = rng.uniform(0, 1.6)  # in pixels of the small picture, so up to 3.2 of a picture of the model's size
    if sigma > 0.25:
        frames = np.stack([cv2.GaussianBlur(frame, (0, 0), sigma) for frame in frames])
    gain, offset, saturation = rng.uniform(0.92, 1.08), rng.uniform(-8, 8), rng.uniform(0.85, 1.08)
    grey = frames.mean(axis=-1, keepdims=True)
    frames = gain * (grey + saturation * (frames - grey)) + offset
    frames += rng.uniform(0, 5) * rng.standard_normal(frames.shape, np.float32)
    return np.clip(frames + 0.5, 0, 255).astype(np.uint8)


class ProbeClips(Dataset[Item]):
    """Item n, a pure function of (seed, n): a view (uint8), the index of each attribute's word (6,), and the mover's
    centres (8, 2) as shares of width and height.

    Items 2n and 2n + 1 show one scene, at its opening and at a random time: painting a backdrop is most of the work.
    """

    def __init__(self, config: ModelConfig, seed: int, *, spoilt: bool = True) -> None:
        self.config, self.seed, self.spoilt = config, seed, spoilt

    def __len__(self) -> int:
        return 2**40

    def scene(self, index: int) -> tuple[world.Scene, NDArray[np.float64]]:
        """The scene of an item and the times of its pictures in seconds, (8,)."""
        rng = item_rng(self.seed, index // 2)
        scene = replace(world.sample_scene(rng), second=None)
        later_s = float(rng.uniform(0, TIME_LIMIT_S))
        # Half of the scenes are off the grid: the probe must find a mover where it is, not where it should be.
        scene = replace(scene, free=bool(rng.random() < 0.5))
        return scene, view_times_s(self.config, later_s if index % 2 else 0.0)

    def __getitem__(self, index: int) -> Item:
        width, height = self.config.width, self.config.height
        scene, times_s = self.scene(index)
        frames = shrink(world.render(scene, times_s, width, height))
        rng = item_rng(self.seed, index // 2, 1 + index % 2)
        if self.spoilt and rng.random() < SPOILT_SHARE:
            frames = spoil(frames, rng)
        words = [names.index(getattr(scene, attribute)) for attribute, names in ATTRIBUTES.items()]
        centres = world.track(scene, times_s, width, height) / (width, height)
        clip = torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous()
        return clip, torch.tensor(words), torch.from_numpy(centres.astype(np.float32))


def probe_batches(dataset: ProbeClips, batch: int, step: int) -> Iterator[Item]:
    """Batches from number `step` on, drawn by a process of their own."""
    loader = DataLoader(dataset, batch, sampler=range(batch * step, len(dataset)), num_workers=1, prefetch_factor=4)
    return iter(loader)
