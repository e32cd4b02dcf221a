"""The tiny decoder of Wan's latents: a small network of plain convolutions, for watching live.

The only memory of the past are blocks that also read what they were given for the frame before, so any pieces of a
stream decode as the whole does. The weights are those of TAEHV (`taew2_1`), which also have an encoder that is left
aside. Source of the layout: github.com/madebyollin/taehv. Knows nothing of time steps and prompts.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.checkpoints import read_checkpoint
from pipeline.errors import PipelineError
from pipeline.fit import difference

WIDTHS = (256, 128, 64, 64)
GROWTH = (1, 2, 2)
"""How many frames each stage makes of one."""


def _conv(inputs: int, outputs: int, *, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)


@dataclass
class TinyMemory:
    """What one stream's decoder remembers: the last input of each block with a memory."""

    before: list[Tensor] = field(default_factory=list)

    def reset(self) -> None:
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


class Stage(nn.Module):
    """Three blocks, then twice the size and `growth` times the frames."""

    def __init__(self, width: int, narrower: int, growth: int) -> None:
        super().__init__()
        self.recalls = nn.ModuleList(Recall(width) for _ in range(3))
        self.grow = nn.Conv2d(width, width * growth, 1, bias=False)
        self.narrow = _conv(width, narrower, bias=False)
        self.growth = growth

    def forward(self, x_TCHW: Tensor, before: Iterator[Tensor], now: list[Tensor]) -> Tensor:
        """before: what the blocks were given last, none at a stream's start. now: takes what they are given."""
        for recall in self.recalls:
            past = next(before, torch.zeros_like(x_TCHW[0]))
            now.append(x_TCHW[-1].clone())
            x_TCHW = recall(x_TCHW, past)
        grown = self.grow(F.interpolate(x_TCHW, scale_factor=2))
        return self.narrow(grown.unflatten(1, (self.growth, -1)).flatten(0, 1))


class TinyDecoder(nn.Module):
    """Latents: normalised, (T, C, h, w). Pictures: float in [-1, 1], (T, 3, 8 h, 8 w)."""

    frames = 4

    def __init__(self, channels: int = 16, widths: tuple[int, int, int, int] = WIDTHS) -> None:
        super().__init__()
        self.enter = _conv(channels, widths[0])
        self.stages = nn.ModuleList(
            Stage(widths[index], widths[index + 1], growth) for index, growth in enumerate(GROWTH)
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


def load_tiny_decoder(path: Path, decoder: TinyDecoder | None = None) -> TinyDecoder:
    """Fill a decoder from TAEHV's file (`taew2_1.pth` or .safetensors); frozen, in single precision.

    Raises PipelineError: `checkpoint_mismatch`, and those of `read_checkpoint`.
    """
    decoder = decoder or TinyDecoder()
    wanted = decoder.state_dict()
    weights = _ours(read_checkpoint(path), wanted)
    if told := difference(weights, wanted):
        raise PipelineError(
            "checkpoint_mismatch", f"{path} is not the tiny decoder of Wan 2.1: {told}.", "Fetch taew2_1 of TAEHV."
        )
    decoder.load_state_dict(weights)
    return decoder.eval().requires_grad_(False)


def _ours(theirs: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """TAEHV counts the layers of one long row; ours have names."""
    names = {"decoder.1": "enter", "decoder.22": "leave"}
    for index in range(len(GROWTH)):
        start, stage = 3 + 6 * index, f"stages.{index}"
        for block in range(3):
            for place, part in ((0, "first"), (2, "second"), (4, "third")):
                names[f"decoder.{start + block}.conv.{place}"] = f"{stage}.recalls.{block}.{part}"
        names |= {f"decoder.{start + 4}.conv": f"{stage}.grow", f"decoder.{start + 5}": f"{stage}.narrow"}
    weights = {}
    for name, value in theirs.items():
        layer, _, kind = name.rpartition(".")
        if layer.startswith("encoder"):
            continue
        ours = f"{names.get(layer, layer)}.{kind}"
        rows = len(wanted[ours]) if ours in wanted else 0
        # Some files grow frames that this decoder does not ask for: the newest come last.
        weights[ours] = value[-rows:] if ours.endswith("grow.weight") and len(value) > rows > 0 else value
    return weights
