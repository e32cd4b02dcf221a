"""The encoded training clips: latents of world scenes on disk, and the scenes they show, to caption anew at each use.

A clip's first chunk is the stream's opening; in half of the clips time jumps after it, as it does between the sink and
the window of a long stream. In four of ten some attributes change at a chunk border, in half of those nearly all of
them: what a prompt change looks like. The mover stays on its path then, and begins anew in the middle if its motion
is what changed.
A share of the clips shows free scenes; these come with their structure, and the others with none: structure control is
learnt where nothing else tells where things are, and dropped everywhere else.
Clips of one chunk are openings: what things look like, at a seventh of a clip's work.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.progress import track as progress
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipeline.codec import PocketCodec, pixels_to_frames
from pipeline.config import ModelConfig
from pipeline.structure import CHANNELS, structure
from pipeline.training import captions, world
from pipeline.training.autoencoder import item_rng
from pipeline.training.footage import Footage

CHUNKS = 4
SWITCH_SHARE = 0.4
WHOLE_SWITCH_SHARE = 0.5
JUMP_SHARE = 0.5
JUMP_LIMIT = 120  # chunks
FREE_SHARE = 0.3


def clip_plan(
    config: ModelConfig, rng: np.random.Generator, chunks: int = CHUNKS
) -> tuple[list[world.Scene], list[float]]:
    """The scene of each chunk, and the second of the scene's time at which the chunk begins."""
    scene = replace(world.sample_scene(rng), free=bool(rng.random() < FREE_SHARE))
    scenes = [scene] * chunks
    chunk_s = config.frames_per_chunk / config.fps
    jump_s = chunk_s * int(rng.integers(JUMP_LIMIT)) if rng.random() < JUMP_SHARE else 0.0
    starts_s = [place * chunk_s + (jump_s if place else 0.0) for place in range(chunks)]
    if chunks > 1 and rng.random() < SWITCH_SHARE:
        other = world.sample_scene(rng)
        share = 0.9 if rng.random() < WHOLE_SWITCH_SHARE else 0.5
        every = ("subject", "colour", "motion", "place", "style")
        names = [name for name in every if rng.random() < share] or ["place"]
        if "motion" in names and other.motion != scene.motion:
            names.append("speed")
        changed = replace(scene, **{name: getattr(other, name) for name in names})
        border = int(rng.integers(1, chunks))
        scenes = [scene] * border + [changed] * (chunks - border)
        if changed.motion != scene.motion:
            starts_s[border:] = [place * chunk_s for place in range(chunks - border)]
    return scenes, starts_s


def foreseeable(starts_s: list[float], chunk_s: float) -> list[bool]:
    """Whether a chunk can be told from the chunks before it; the one that time jumped to can not."""
    return [
        place != 1 or start_s == 0 or start_s < starts_s[0] + chunk_s + 1e-6 for place, start_s in enumerate(starts_s)
    ]


class Plans(Dataset[tuple[Tensor, str]]):
    """Item n: the pictures of clip n (uint8 THWC) and its plan as JSON; a pure function of (seed, n).

    footage: the clips are cut from it and not from the world, and keep its captions.
    """

    def __init__(
        self, config: ModelConfig, seed: int, count: int, chunks: int = CHUNKS, footage: Footage | None = None
    ) -> None:
        self.config, self.seed, self.count, self.chunks, self.footage = config, seed, count, chunks, footage

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        config, rng = self.config, item_rng(self.seed, index)
        if self.footage is not None:
            cut, caption = self.footage.cut(rng, self.chunks * config.frames_per_chunk)
            chunk_s = config.frames_per_chunk / config.fps
            starts = [place * chunk_s for place in range(self.chunks)]
            return torch.from_numpy(cut.copy()), json.dumps({"captions": [caption] * self.chunks, "starts_s": starts})
        scenes, starts_s = clip_plan(config, rng, self.chunks)
        within_s = np.arange(config.frames_per_chunk) / config.fps
        pictures = [
            world.render(scene, start_s + within_s, config.width, config.height)
            for scene, start_s in zip(scenes, starts_s, strict=True)
        ]
        plan = {"scenes": [asdict(scene) for scene in scenes], "starts_s": starts_s}
        return torch.from_numpy(np.concatenate(pictures)), json.dumps(plan)


@torch.no_grad()
def encode_clips(
    config: ModelConfig,
    codec: PocketCodec,
    folder: Path,
    *,
    count: int,
    seed: int,
    chunks: int = CHUNKS,
    footage: Footage | None = None,
) -> None:
    """Write `latents.npy` (float16, clips x frames x C x h x w), `structure.npy` (the same, uint8 of 0 to 255) and
    `plans.jsonl`; goes on where it was stopped."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = (count, chunks * config.chunk, config.codec.latent_channels, *config.latent_size)
    edged = (*shape[:2], CHANNELS, *shape[3:])
    path, edges, lines = folder / "latents.npy", folder / "structure.npy", folder / "plans.jsonl"
    whole = all(
        file.is_file() and np.load(file, mmap_mode="r").shape == size for file, size in ((path, shape), (edges, edged))
    )
    done = _whole_lines(lines) if whole else 0
    mode = "r+" if done else "w+"
    latents = np.lib.format.open_memmap(path, mode, np.float16, shape)
    structures = np.lib.format.open_memmap(edges, mode, np.uint8, edged)
    plans = Plans(config, seed, count, chunks, footage)
    loader = DataLoader(plans, 4, sampler=range(done, count), num_workers=1, prefetch_factor=4)
    with lines.open("a" if done else "w") as out:
        for pictures, texts in progress(loader, description=f"{folder.name:<12}"):
            frames = torch.stack([pixels_to_frames(clip) for clip in pictures])
            with torch.autocast("cpu", dtype=torch.bfloat16):
                encoded = codec.encode(frames)
            latents[done : done + len(encoded)] = encoded.float().numpy()
            found = [structure(clip, config.codec.frames, config.codec.spatial_stride) for clip in frames]
            structures[done : done + len(encoded)] = (torch.stack(found) * 255).round().numpy()
            done += len(encoded)
            latents.flush()
            structures.flush()
            out.writelines(line + "\n" for line in texts)
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


class Batch(NamedTuple):
    """latents_BTCHW: float32. captions: one for each chunk (B * chunks), a clip's first chunk first. known_BK: which
    chunks can be told from their past, float32 of 0 and 1. control_BTCHW: structure, float32 of 0 to 1; 0 where none is
    told. movers_BTHW: where the main mover is, float32 of 0 and 1; 0 in clips of the user's own."""

    latents_BTCHW: Tensor
    captions: list[str]
    known_BK: Tensor
    control_BTCHW: Tensor
    movers_BTHW: Tensor


class Clips:
    """Batches of encoded clips with fresh captions, counter-based: batch n is a pure function of (seed, n)."""

    def __init__(self, folder: Path, config: ModelConfig, seed: int) -> None:
        self.latents, self.structure = np.load(folder / "latents.npy"), np.load(folder / "structure.npy")
        plans = [json.loads(line) for line in (folder / "plans.jsonl").read_text().splitlines()]
        self.scenes = [[scene_from(item) for item in plan.get("scenes", ())] for plan in plans]
        self.captions: list[list[str] | None] = [plan.get("captions") for plan in plans]
        chunk_s = config.frames_per_chunk / config.fps
        self.free = np.array([bool(scenes) and scenes[0].free for scenes in self.scenes])
        self.foreseeable = np.array([foreseeable(plan["starts_s"], chunk_s) for plan in plans])
        self.movers = np.zeros((*self.latents.shape[:2], *self.latents.shape[3:]), bool)
        within_s = np.arange(config.frames_per_chunk).reshape(config.chunk, -1) / config.fps
        for index, plan in enumerate(plans):
            for place, (scene, start_s) in enumerate(zip(self.scenes[index], plan["starts_s"], strict=False)):
                for frame, times_s in enumerate(start_s + within_s, place * config.chunk):
                    self.movers[index, frame] = world.mover_cells(scene, times_s, *config.latent_size)
        self.seed = seed

    @property
    def chunks(self) -> int:
        return self.foreseeable.shape[1]

    def batch(self, step: int, size: int) -> Batch:
        """Clips `size` at a time. A clip of the user's own comes with its structure every other time."""
        rng = item_rng(self.seed, step)
        picked = rng.integers(0, len(self.latents), size)
        latents = torch.from_numpy(np.stack([self.latents[index] for index in picked]).astype(np.float32))
        known = torch.from_numpy(self.foreseeable[picked].astype(np.float32))
        captions = list(self._captions(picked, rng))
        told = np.where([not self.scenes[index] for index in picked], rng.random(size) < 0.5, self.free[picked])
        edges = np.stack([self.structure[index] * keep for index, keep in zip(picked, told, strict=True)])
        movers = torch.from_numpy(self.movers[picked].astype(np.float32))
        return Batch(latents, captions, known, torch.from_numpy(edges.astype(np.float32) / 255), movers)

    def _captions(self, picked: np.ndarray, rng: np.random.Generator) -> Iterator[str]:
        for index in picked:
            yield from self.captions[index] or ()
            previous, text = None, ""
            for scene in self.scenes[index]:
                if scene != previous:
                    previous, text = scene, captions.caption(scene, rng)
                yield text


def scene_from(values: dict[str, object]) -> world.Scene:
    second = values["second"]
    return world.Scene(**{**values, "second": tuple(second) if isinstance(second, list) else None})  # type: ignore[arg-type]
