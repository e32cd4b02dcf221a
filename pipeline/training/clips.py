"""The encoded training clips: latents of world scenes on disk, and the scenes they show, to caption anew at each use.

A clip has `CHUNKS` chunks. The first is the stream's beginning; in half of the clips time jumps after it, as it does
between the sink and the window of a long stream. In a quarter of them some attributes change at a chunk border while
the mover stays on its path: what a prompt change looks like.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from rich.progress import track as progress
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipeline.codec import PocketCodec, pixels_to_frames
from pipeline.config import ModelConfig
from pipeline.training import captions, world
from pipeline.training.autoencoder import item_rng

CHUNKS = 4
SWITCH_SHARE = 0.25


def clip_plan(config: ModelConfig, rng: np.random.Generator) -> tuple[list[world.Scene], np.ndarray]:
    """The scene of each chunk, and the times of all frames in seconds."""
    scene = world.sample_scene(rng)
    scenes = [scene] * CHUNKS
    if rng.random() < SWITCH_SHARE:
        other = world.sample_scene(rng)
        names = [name for name in ("subject", "colour", "motion", "place", "style") if rng.random() < 0.5] or ["place"]
        changed = replace(scene, **{name: getattr(other, name) for name in names})
        border = int(rng.integers(1, CHUNKS))
        scenes = [scene] * border + [changed] * (CHUNKS - border)
    times_s = rng.uniform(0, 600) + np.arange(CHUNKS * config.frames_per_chunk) / config.fps
    if rng.random() < 0.5:
        times_s[config.frames_per_chunk :] += rng.uniform(0, 60)
    return scenes, times_s


class Plans(Dataset[tuple[Tensor, str]]):
    """Item n: the pictures of clip n (uint8 THWC) and its scenes as JSON; a pure function of (seed, n)."""

    def __init__(self, config: ModelConfig, seed: int, count: int) -> None:
        self.config, self.seed, self.count = config, seed, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        config = self.config
        scenes, times_s = clip_plan(config, item_rng(self.seed, index))
        pieces, start = [], 0
        for border in range(1, CHUNKS + 1):
            if border == CHUNKS or scenes[border] != scenes[start]:
                part = times_s[start * config.frames_per_chunk : border * config.frames_per_chunk]
                pieces.append(world.render(scenes[start], part, config.width, config.height))
                start = border
        return torch.from_numpy(np.concatenate(pieces)), json.dumps([asdict(scene) for scene in scenes])


@torch.no_grad()
def encode_clips(config: ModelConfig, codec: PocketCodec, folder: Path, *, count: int, seed: int) -> None:
    """Write `latents.npy` (float16, clips x frames x C x h x w) and `scenes.jsonl`; goes on where it was stopped."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = (count, CHUNKS * config.chunk, config.codec.latent_channels, *config.latent_size)
    path, lines = folder / "latents.npy", folder / "scenes.jsonl"
    done = _whole_lines(lines) if path.is_file() and np.load(path, mmap_mode="r").shape == shape else 0
    mode = "r+" if done else "w+"
    latents = np.lib.format.open_memmap(path, mode, np.float16, shape)
    loader = DataLoader(Plans(config, seed, count), 4, sampler=range(done, count), num_workers=1, prefetch_factor=4)
    with lines.open("a" if done else "w") as out:
        for pictures, scenes in progress(loader, description="clips       "):
            frames = torch.stack([pixels_to_frames(clip) for clip in pictures])
            with torch.autocast("cpu", dtype=torch.bfloat16):
                encoded = codec.encode(frames)
            latents[done : done + len(encoded)] = encoded.float().numpy()
            done += len(encoded)
            latents.flush()
            out.writelines(line + "\n" for line in scenes)
            out.flush()


def _whole_lines(path: Path) -> int:
    """Clips recorded so far; a line that a kill cut short is taken away."""
    if not path.is_file():
        return 0
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    return whole.count("\n")


class Clips:
    """Batches of encoded clips with fresh captions, counter-based: batch n is a pure function of (seed, n)."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.latents = np.load(folder / "latents.npy")
        lines = (folder / "scenes.jsonl").read_text().splitlines()
        self.scenes = [[scene_from(item) for item in json.loads(line)] for line in lines]
        self.seed = seed

    def batch(self, step: int, size: int) -> tuple[Tensor, list[str]]:
        """latents_BTCHW float32, and a caption for each chunk (B * CHUNKS), the clip's first chunk first."""
        rng = item_rng(self.seed, step)
        picked = rng.integers(0, len(self.scenes), size)
        latents = torch.from_numpy(np.stack([self.latents[index] for index in picked]).astype(np.float32))
        return latents, list(self._captions(picked, rng))

    def _captions(self, picked: np.ndarray, rng: np.random.Generator) -> Iterator[str]:
        for index in picked:
            previous, text = None, ""
            for scene in self.scenes[index]:
                if scene != previous:
                    previous, text = scene, captions.caption(scene, rng)
                yield text


def scene_from(values: dict[str, object]) -> world.Scene:
    second = values["second"]
    return world.Scene(**{**values, "second": tuple(second) if isinstance(second, list) else None})  # type: ignore[arg-type]
