"""The attribute probe: a small network that looks at a clip and says what is in it, in the world's own words.

It measures what a model drew; no model is ever trained on what it says. Where the mover is comes from a heat map.
Subject and colour are read there, place and style from the whole picture, and motion and speed from the path of the
centres alone: a fish that looks left and stays where it is does not count as moving left.
It knows only single movers of the world, and always names something, even for a picture of nothing.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config import ModelConfig
from pipeline.training.loop import Trainer
from pipeline.training.measures import Motion, agreement, meant, measure_motion
from pipeline.training.probe_clips import ATTRIBUTES, FRAMES, HEIGHT, WIDTH, Item, ProbeClips, probe_batches
from pipeline.training.settings import StageSettings

CELL = 8  # side of a heat map's cell in pixels of the small picture
ROWS, COLUMNS = HEIGHT // CELL, WIDTH // CELL
FEATURES = 128
_LOOK, _PATH = 96, 32
_ON_PATH = ("motion", "speed")
EMBEDDED = Path(__file__).with_name("probe.safetensors")


def _block(inner: int, outer: int, stride: int = 1, size: int = 3) -> nn.Sequential:
    conv = nn.Conv2d(inner, outer, size, stride, (size - 1) // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outer), nn.ReLU(inplace=True))


@dataclass(frozen=True)
class Reading:
    """What one forward says, as tensors.

    logits: by attribute, (B, words). heat: logarithms of shares, (B, T, rows * columns). centres_BT2: x and y as shares
    of width and height. features: (B, 128), what the words were read from.
    """

    logits: dict[str, Tensor]
    heat: Tensor
    centres_BT2: Tensor
    features: Tensor


@dataclass(frozen=True)
class Answers:
    """What the probe says of many clips. words: one dict per clip, attribute to word."""

    words: list[dict[str, str]]
    centres_BT2: NDArray[np.float64]
    features: NDArray[np.float64]


class Probe(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Sequential(_block(3, 24, 4, 6), _block(24, 48), _block(48, 96, 2))
        self.coarse = nn.Sequential(_block(96, 128, 2), _block(128, 128))
        self.lateral = nn.Conv2d(96, 128, 1)
        self.spot = nn.Conv2d(128, 1, 1)
        self.look = nn.Sequential(nn.Linear(2 * 128, _LOOK), nn.SiLU())
        self.path = nn.Sequential(nn.Linear(5 * FRAMES, 96), nn.SiLU(), nn.Linear(96, _PATH), nn.SiLU())
        self.heads = nn.ModuleDict(
            {name: nn.Linear(_PATH if name in _ON_PATH else _LOOK, len(words)) for name, words in ATTRIBUTES.items()}
        )
        self.register_buffer("columns", (torch.arange(COLUMNS) + 0.5) / COLUMNS, persistent=False)
        self.register_buffer("rows", (torch.arange(ROWS) + 0.5) / ROWS, persistent=False)
        self.columns: Tensor
        self.rows: Tensor

    def forward(self, clips_BTCHW: Tensor) -> Reading:
        """clips: (B, 8, 3, 96, 160) in [0, 255], uint8 or float."""
        assert clips_BTCHW.shape[1:] == (FRAMES, 3, HEIGHT, WIDTH), f"a clip is no {tuple(clips_BTCHW.shape[1:])}"
        pictures = clips_BTCHW.flatten(0, 1).float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)
        fine = self.fine(pictures)
        wide = F.interpolate(self.coarse(fine), scale_factor=2.0, mode="nearest")
        seen = F.relu(self.lateral(fine) + wide).unflatten(0, (-1, FRAMES)).float()
        heat = self.spot(seen.flatten(0, 1)).float().view(len(seen), FRAMES, -1).log_softmax(-1)
        shares = heat.exp()
        centres = self._centres(shares)
        mover = torch.einsum("btchw,bthw->bc", seen, shares.unflatten(-1, (ROWS, COLUMNS))) / FRAMES
        look = self.look(torch.cat([mover, seen.mean((1, 3, 4))], 1)).float()
        path = self.path(self._steps(centres.detach())).float()
        logits = {name: head(path if name in _ON_PATH else look).float() for name, head in self.heads.items()}
        return Reading(logits, heat, centres, torch.cat([look, path], 1))

    def _centres(self, shares: Tensor) -> Tensor:
        """Mean place of the heat. Across, the mean is taken on a circle: a mover on its way round the edge shows at
        both sides, and its centre is not in the middle."""
        across, down = shares.unflatten(-1, (ROWS, COLUMNS)).sum(-2), shares.unflatten(-1, (ROWS, COLUMNS)).sum(-1)
        turn = 2 * math.pi * self.columns
        x = torch.atan2((across * turn.sin()).sum(-1), (across * turn.cos()).sum(-1) + 1e-6) / (2 * math.pi)
        return torch.stack([x.remainder(1.0), (down * self.rows).sum(-1)], -1)

    @staticmethod
    def _steps(centres_BT2: Tensor) -> Tensor:
        """Where the centres are and how they go on, about unit size, (B, 5 * T)."""
        turn = 2 * math.pi * centres_BT2[..., :1]
        step = F.pad(centres_BT2.diff(dim=1), (0, 0, 0, 1))
        step = 10 * (step - step.round())
        return torch.cat([turn.sin(), turn.cos(), 5 * (centres_BT2[..., 1:] - 0.5), step], -1).flatten(1)

    @torch.no_grad()
    def read(self, clips_BTCHW: Tensor, batch: int = 16) -> Answers:
        """clips: uint8 views on the CPU, any number of them. Call it in eval mode."""
        words: list[dict[str, str]] = []
        centres, features = [], []
        for part in clips_BTCHW.split(batch):
            reading = self(part.to(self.rows.device))
            best = {name: logits.argmax(1).tolist() for name, logits in reading.logits.items()}
            words += [{name: ATTRIBUTES[name][best[name][k]] for name in ATTRIBUTES} for k in range(len(part))]
            centres.append(reading.centres_BT2.double().cpu().numpy())
            features.append(reading.features.double().cpu().numpy())
        return Answers(words, np.concatenate(centres), np.concatenate(features))


def probe_loss(reading: Reading, words: Tensor, centres_BT2: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Cross-entropy for each attribute and for the heat map, and the distance of the centres."""
    rows, columns = (torch.arange(count, device=words.device).add(0.5).div(count) for count in (ROWS, COLUMNS))
    away_x = centres_BT2[..., :1] - columns
    away_x = (away_x - away_x.round()) * COLUMNS
    away_y = (centres_BT2[..., 1:] - rows) * ROWS
    near = torch.exp(-(away_x[..., None, :].square() + away_y[..., None].square()) / (2 * 0.8**2)).flatten(-2)
    heat = -(near / near.sum(-1, keepdim=True) * reading.heat).sum(-1).mean()
    off = reading.centres_BT2 - centres_BT2
    off = torch.cat([off[..., :1] - off[..., :1].round(), off[..., 1:]], -1)
    distance = F.smooth_l1_loss(off, torch.zeros_like(off), beta=0.01)
    total, scalars = heat + 20 * distance, {"centre": off.norm(dim=-1).mean().item()}
    for place, (name, logits) in enumerate(reading.logits.items()):
        total = total + F.cross_entropy(logits, words[:, place])
        scalars[name] = (logits.argmax(1) == words[:, place]).float().mean().item()
    return total, scalars


def train_probe(
    config: ModelConfig, folder: Path, settings: StageSettings, *, seed: int = 31, batch: int = 32, device: str = "cpu"
) -> Probe:
    """Train until the budget is spent; returns the averaged probe in eval mode, on the CPU."""
    torch.manual_seed(seed)
    probe = Probe().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    trainer = Trainer("probe", folder, probe, settings)
    stream = probe_batches(ProbeClips(config, seed), batch, trainer.step * settings.accumulate)
    probe.train()

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        clips, words, centres = (part.to(device) for part in next(stream))
        with torch.autocast(clips.device.type, dtype=torch.bfloat16):
            reading = probe(clips)
        return probe_loss(reading, words, centres)

    trainer.fit(loss)
    average = Probe()
    average.load_state_dict(trainer.ema.values)
    return average.eval().requires_grad_(False)


def save_probe(probe: Probe, path: Path, about: str) -> None:
    """Stored in half precision, computed in single. about: how it was trained and what it reads, kept in the file."""
    values = {key: value.half() if value.is_floating_point() else value for key, value in probe.state_dict().items()}
    save_file({key: value.contiguous() for key, value in values.items()}, path, {"about": about})


def told_of(path: Path) -> str:
    """What a probe's file says of itself."""
    with safe_open(path, "pt") as file:
        return (file.metadata() or {}).get("about", "which tells nothing of itself")


def load_probe(path: Path) -> Probe:
    """Frozen and in eval mode."""
    probe = Probe()
    probe.load_state_dict(load_file(path), strict=True)
    return probe.eval().requires_grad_(False)


@dataclass(frozen=True)
class Bounds:
    """How well the probe reads renders that it never saw.

    ceiling, floor: share of right words by attribute, against the clips' own captions and against other clips'.
    centre_px: median distance of its centres from the true ones, in pixels of the model's picture. motion: what it
    measures of true motion; its errors are the instrument's own.
    """

    ceiling: dict[str, float]
    floor: dict[str, float]
    centre_px: float
    motion: Motion


def bounds(probe: Probe, config: ModelConfig, *, count: int = 512, seed: int = 32) -> Bounds:
    """Read `count` held-out renders, unspoilt; the seed is not the one of training."""
    assert count >= 4, f"{count} clips cannot change their captions"
    dataset = ProbeClips(config, seed, spoilt=False)
    items: list[Item] = [dataset[index] for index in range(count)]
    plans = [dataset.scene(index) for index in range(count)]
    answers = probe.read(torch.stack([clip for clip, _, _ in items]))
    own = [meant(scene) for scene, _ in plans]
    off = answers.centres_BT2 - torch.stack([centres for _, _, centres in items]).double().numpy()
    off[..., 0] -= np.rint(off[..., 0])
    return Bounds(
        ceiling=agreement(answers.words, own),
        # Turned by half, so that no clip meets the other one of its scene.
        floor=agreement(answers.words, own[count // 2 :] + own[: count // 2]),
        centre_px=float(np.median(np.hypot(off[..., 0] * config.width, off[..., 1] * config.height))),
        motion=measure_motion(
            answers.centres_BT2,
            [scene for scene, _ in plans],
            np.stack([times_s for _, times_s in plans]),
            width=config.width,
            height=config.height,
        ),
    )
