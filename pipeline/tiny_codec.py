"""The tiny encoder and decoder of Wan's latents: small networks of plain convolutions, for watching live.

The only memory of the past are blocks that also read what they were given for the frame before, so any pieces of a
stream come out as the whole does. The weights are those of TAEHV (`taew2_1`); its latents are the normalised ones that
Wan's transformers know. Source of the layout: github.com/madebyollin/taehv. Knows nothing of time steps and prompts.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.checkpoints import read_checkpoint
from pipeline.codec import PicturesPending
from pipeline.errors import PipelineError
from pipeline.fit import difference

WIDTHS = (256, 128, 64, 64)
GROWTH = (1, 2, 2)
"""How many frames each stage of the decoder makes of one."""
ENCODER_WIDTH = 64
SHRINKAGE = (2, 2, 1)
"""Of how many frames each stage of the encoder makes one."""


def _conv(inputs: int, outputs: int, *, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)


@dataclass
class TinyMemory(PicturesPending):
    """What one direction of one stream remembers: the last input of each block with a memory, none at the start."""

    before: list[Tensor] = field(default_factory=list)

    def reset(self) -> None:
        super().reset()
        self.before.clear()


class Recall(nn.Module):
    """A residual block that reads a frame and what it read as the frame before."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second, self.third = _conv(2 * width, width), _conv(width, width), _conv(width, width)

    def forward(self, x_TCHW: Tensor, before_CHW: Tensor) -> Tensor:
        past = torch.cat((before_CHW[None], x_TCHW[:-1]))
        hidden = F.relu(self.first(torch.cat((x_TCHW, past), 1)))
        return F.relu(self.third(F.relu(self.second(hidden))) + x_TCHW)


class Recalls(nn.ModuleList):
    """Three such blocks, one after the other."""

    def __init__(self, width: int) -> None:
        super().__init__(Recall(width) for _ in range(3))

    def forward(self, x_TCHW: Tensor, before: Iterator[Tensor], now: list[Tensor]) -> Tensor:
        """before: what the blocks were given last, none at a stream's start. now: takes what they are given."""
        for recall in self:
            past = next(before, torch.zeros_like(x_TCHW[0]))
            now.append(x_TCHW[-1].clone())
            x_TCHW = recall(x_TCHW, past)
        return x_TCHW


class Grow(nn.Module):
    """Three blocks, then twice the size and `growth` times the frames."""

    def __init__(self, width: int, narrower: int, growth: int) -> None:
        super().__init__()
        self.recalls = Recalls(width)
        self.grow = nn.Conv2d(width, width * growth, 1, bias=False)
        self.narrow = _conv(width, narrower, bias=False)
        self.growth = growth

    def forward(self, x_TCHW: Tensor, before: Iterator[Tensor], now: list[Tensor]) -> Tensor:
        grown = self.grow(F.interpolate(self.recalls(x_TCHW, before, now), scale_factor=2))
        return self.narrow(grown.unflatten(1, (self.growth, -1)).flatten(0, 1))


class Shrink(nn.Module):
    """One frame of `shrinkage`, half the size, then three blocks."""

    def __init__(self, width: int, shrinkage: int) -> None:
        super().__init__()
        self.pool = nn.Conv2d(width * shrinkage, width, 1, bias=False)
        self.halve = nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False)
        self.recalls = Recalls(width)
        self.shrinkage = shrinkage

    def forward(self, x_TCHW: Tensor, before: Iterator[Tensor], now: list[Tensor]) -> Tensor:
        pooled = self.pool(x_TCHW.unflatten(0, (-1, self.shrinkage)).flatten(1, 2))
        return self.recalls(self.halve(pooled), before, now)


class TinyDecoder(nn.Module):
    """Latents: normalised, (T, C, h, w). Pictures: float in [-1, 1], (T, 3, 8 h, 8 w)."""

    frames = 4

    def __init__(self, channels: int = 16, widths: tuple[int, int, int, int] = WIDTHS) -> None:
        super().__init__()
        self.enter = _conv(channels, widths[0])
        self.stages = nn.ModuleList(
            Grow(widths[index], widths[index + 1], growth) for index, growth in enumerate(GROWTH)
        )
        self.leave = _conv(widths[-1], 3)

    def remember(self) -> TinyMemory:
        return TinyMemory()

    def decode_push(self, memory: TinyMemory, latents_TCHW: Tensor) -> Tensor:
        """Decode the next latent frames of a stream; returns pictures, four for each, one for a stream's first."""
        first, before = not memory.before, iter(memory.before)
        memory.before = []
        # A latent far out of range would be seen as a flash.
        x = F.relu(self.enter(3 * torch.tanh(latents_TCHW / 3)))
        for stage in self.stages:
            x = stage(x, before, memory.before)
        pictures = self.leave(F.relu(x)).clamp(0, 1) * 2 - 1
        # The first latent frame of a stream is one picture; the three before it belong to no time.
        return pictures[self.frames - 1 :] if first else pictures


class TinyEncoder(nn.Module):
    """Pictures: float in [-1, 1], (T, 3, H, W). Latents: normalised, (T, C, H / 8, W / 8)."""

    frames = 4

    def __init__(self, channels: int = 16, width: int = ENCODER_WIDTH) -> None:
        super().__init__()
        self.enter = _conv(3, width)
        self.stages = nn.ModuleList(Shrink(width, shrinkage) for shrinkage in SHRINKAGE)
        self.leave = _conv(width, channels)

    def remember(self) -> TinyMemory:
        return TinyMemory()

    def encode_push(self, memory: TinyMemory, frames_TCHW: Tensor) -> Tensor | None:
        """Take any number of pictures; return the latent frames they complete (T, C, h, w), or None: needs more.

        A stream's first picture makes a latent frame, then every four do, as with Wan's autoencoder. TAEHV reads a
        latent frame from its newest picture and the three that follow. A stream does not wait for those: the newest
        picture stands for them, which is TAEHV's rule at the end of a clip. What the blocks remember is of those that
        did follow.
        """
        first, frames, latents = not memory.pending_TCHW, memory.take((frames_TCHW + 1) / 2), []
        while len(frames) > (0 if first else self.frames):
            if not first:
                _, memory.before = self._read(frames[: self.frames], memory.before)
                frames = frames[self.frames :]
            latent, _ = self._read(frames[:1].expand(self.frames, -1, -1, -1), memory.before)
            latents.append(latent)
            first = False
        memory.keep(frames)
        return torch.cat(latents) if latents else None

    def _read(self, frames_TCHW: Tensor, before: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """A latent frame of four pictures in [0, 1], and what its blocks were given."""
        x, past, now = F.relu(self.enter(frames_TCHW)), iter(before), list[Tensor]()
        for stage in self.stages:
            x = stage(x, past, now)
        return self.leave(x), now


def load_tiny_decoder(path: Path, decoder: TinyDecoder | None = None) -> TinyDecoder:
    """Fill a decoder from TAEHV's file (`taew2_1.pth` or .safetensors); frozen, in single precision.

    Raises PipelineError: `checkpoint_mismatch`, and those of `read_checkpoint`.
    """
    decoder = decoder or TinyDecoder()
    weights = {name: value for name, value in read_checkpoint(path).items() if not name.startswith("encoder.")}
    _fill(decoder, weights, _decoder_names(), f"{path} is not the tiny decoder of Wan 2.1")
    return decoder


def load_tiny_encoder(path: Path, encoder: TinyEncoder | None = None) -> TinyEncoder | None:
    """The same for the encoder; None: the file has none.

    Raises PipelineError: `checkpoint_mismatch`, and those of `read_checkpoint`.
    """
    weights = {name: value for name, value in read_checkpoint(path).items() if name.startswith("encoder.")}
    if not weights:
        return None
    encoder = encoder or TinyEncoder()
    _fill(encoder, weights, _encoder_names(), f"{path} is not the tiny encoder of Wan 2.1")
    return encoder


def _fill(part: nn.Module, theirs: Mapping[str, Tensor], names: Mapping[str, str], wrong: str) -> None:
    """names: ours by theirs, of layers. wrong: begins the sentence about a file that does not fit."""
    wanted, weights = part.state_dict(), {}
    for name, value in theirs.items():
        layer, _, kind = name.rpartition(".")
        ours = f"{names.get(layer, layer)}.{kind}"
        rows = len(wanted[ours]) if ours in wanted else 0
        # Some files grow frames that this decoder does not ask for: the newest come last.
        weights[ours] = value[-rows:] if ours.endswith("grow.weight") and len(value) > rows > 0 else value
    if told := difference(weights, wanted):
        raise PipelineError("checkpoint_mismatch", f"{wrong}: {told}.", "Fetch taew2_1 of TAEHV.")
    part.load_state_dict(weights)
    part.eval().requires_grad_(False)


def _decoder_names() -> dict[str, str]:
    """TAEHV counts the layers of one long row; ours have names."""
    names = {"decoder.1": "enter", "decoder.22": "leave"}
    for index in range(len(GROWTH)):
        start, stage = 3 + 6 * index, f"stages.{index}"
        names |= _recall_names("decoder", start, stage)
        names |= {f"decoder.{start + 4}.conv": f"{stage}.grow", f"decoder.{start + 5}": f"{stage}.narrow"}
    return names


def _encoder_names() -> dict[str, str]:
    names = {"encoder.0": "enter", "encoder.17": "leave"}
    for index in range(len(SHRINKAGE)):
        start, stage = 2 + 5 * index, f"stages.{index}"
        names |= {f"encoder.{start}.conv": f"{stage}.pool", f"encoder.{start + 1}": f"{stage}.halve"}
        names |= _recall_names("encoder", start + 2, stage)
    return names


def _recall_names(row: str, start: int, stage: str) -> dict[str, str]:
    parts = {0: "first", 2: "second", 4: "third"}
    return {
        f"{row}.{start + block}.conv.{place}": f"{stage}.recalls.{block}.{part}"
        for block in range(3)
        for place, part in parts.items()
    }
