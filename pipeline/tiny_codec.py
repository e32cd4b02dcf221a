"""The tiny encoder and decoder of Wan's latents: small networks of plain convolutions, for watching live.

The only memory of the past are blocks that also read what they were given for the frame before, so any pieces of a
stream come out as the whole does. The weights are those of TAEHV (`taew2_1`); its latents are the normalised ones that
Wan's transformers know. Source of the layout: github.com/madebyollin/taehv. Knows nothing of time steps and prompts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.checkpoints import read_checkpoint
from pipeline.codec import PicturesPending
from pipeline.errors import PipelineError
from pipeline.fit import difference
from pipeline.rims import Part, Run, Whole, grid_of, pays
from pipeline.tiles import Tiles

WIDTHS = (256, 128, 64, 64)
GROWTH = (1, 2, 2)
"""How many frames each stage of the decoder makes of one."""
STRIDE = 8
"""Pixels to a latent cell, along each side."""
ENCODER_WIDTH = 64
HALO = 1
"""Rings of tiles that are encoded around the chosen ones, since what these showed before is still seen there. Who
decodes chooses more than what was drawn for the same reason."""
SHRINKAGE = (2, 2, 1)
"""Of how many frames each stage of the encoder makes one."""


def _conv(inputs: int, outputs: int, *, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)


@dataclass
class TinyMemory(PicturesPending):
    """What one direction of one stream remembers; past and rims are those of `Run`.

    glance: the rims of runs that read a latent frame before all of its pictures were there.
    """

    past: list[Tensor] = field(default_factory=list)
    rims: list[Tensor] = field(default_factory=list)
    glance: list[Tensor] = field(default_factory=list)

    def reset(self) -> None:
        super().reset()
        self.past.clear()
        self.forget_tiles()

    def forget_tiles(self) -> None:
        self.rims.clear()
        self.glance.clear()


class Recall(nn.Module):
    """A residual block that reads a frame and what it read as the frame before."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second, self.third = _conv(2 * width, width), _conv(width, width), _conv(width, width)

    def forward(self, x_TCHW: Tensor, run: Run) -> Tensor:
        past = torch.cat((run.before(x_TCHW)[None], x_TCHW[:-1]))
        hidden = F.relu(run.near(self.first, torch.cat((x_TCHW, past), 1)))
        return F.relu(run.near(self.third, F.relu(run.near(self.second, hidden))) + x_TCHW)


class Recalls(nn.ModuleList):
    """Three such blocks, one after the other."""

    def __init__(self, width: int) -> None:
        super().__init__(Recall(width) for _ in range(3))

    def forward(self, x_TCHW: Tensor, run: Run) -> Tensor:
        for recall in self:
            x_TCHW = recall(x_TCHW, run)
        return x_TCHW


class Grow(nn.Module):
    """Three blocks, then twice the size and `growth` times the frames."""

    def __init__(self, width: int, narrower: int, growth: int) -> None:
        super().__init__()
        self.recalls = Recalls(width)
        self.grow = nn.Conv2d(width, width * growth, 1, bias=False)
        self.narrow = _conv(width, narrower, bias=False)
        self.growth = growth

    def forward(self, x_TCHW: Tensor, run: Run) -> Tensor:
        grown = self.grow(self.recalls(x_TCHW, run)).unflatten(1, (self.growth, -1)).flatten(0, 1)
        return run.near(self.narrow, grown, grow=2)


class Shrink(nn.Module):
    """One frame of `shrinkage`, half the size, then three blocks."""

    def __init__(self, width: int, shrinkage: int) -> None:
        super().__init__()
        self.pool = nn.Conv2d(width * shrinkage, width, 1, bias=False)
        self.halve = nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False)
        self.recalls = Recalls(width)
        self.shrinkage = shrinkage

    def forward(self, x_TCHW: Tensor, run: Run) -> Tensor:
        pooled = self.pool(x_TCHW.unflatten(0, (-1, self.shrinkage)).flatten(1, 2))
        return self.recalls(run.near(self.halve, pooled), run)


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
        return self._whole(memory, latents_TCHW, None)

    def decode_tiles(self, memory: TinyMemory, latents_TCHW: Tensor, tiles: Tiles | None) -> Tensor:
        """The same, of these tiles alone, a column; None is all of them, remembered for latents of which a part is
        decoded. latents_TCHW: whole."""
        if tiles is not None and memory.rims and pays(tiles):
            return self._read(tiles.gather(latents_TCHW), Part(memory.past, memory.rims, tiles))
        pictures = self._whole(memory, latents_TCHW, grid_of(latents_TCHW, STRIDE))
        return pictures if tiles is None else tiles.gather(pictures)

    def _whole(self, memory: TinyMemory, latents_TCHW: Tensor, grid: tuple[int, int] | None) -> Tensor:
        first = not memory.past
        pictures = self._read(latents_TCHW, Whole(memory.past, memory.rims, len(latents_TCHW), grid))
        # The first latent frame of a stream is one picture; the three before it belong to no time.
        return pictures[self.frames - 1 :] if first else pictures

    def _read(self, latents_TCHW: Tensor, run: Run) -> Tensor:
        """Four pictures of each latent frame."""
        # A latent far out of range would be seen as a flash.
        x = F.relu(run.near(self.enter, 3 * torch.tanh(latents_TCHW / 3)))
        for stage in self.stages:
            x = stage(x, run)
        return run.near(self.leave, F.relu(x)).clamp(0, 1) * 2 - 1


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
        return self._push(memory, frames_TCHW, None, None)

    def encode_tiles(self, memory: TinyMemory, frames_TCHW: Tensor, tiles: Tiles | None) -> Tensor:
        """Latents of a chunk of whole pictures, of these tiles alone, a column; None is all of them, remembered for
        pictures of which a part is encoded."""
        wider = None if tiles is None else tiles.wider(HALO)
        if wider is not None and not (memory.rims and memory.glance and pays(wider)):
            wider = None
        latents = self._push(memory, frames_TCHW, wider, grid_of(frames_TCHW))
        assert latents is not None, "a chunk of pictures fills its latent frames"
        if tiles is None:
            return latents
        return tiles.gather(latents) if wider is None else tiles.among(wider, latents)

    def _push(
        self, memory: TinyMemory, frames_TCHW: Tensor, tiles: Tiles | None, grid: tuple[int, int] | None
    ) -> Tensor | None:
        """tiles: to encode alone. grid: the tiles whose rims are remembered of what is whole."""

        def read(frames_TCHW: Tensor, rims: list[Tensor], *, keeps: bool) -> Tensor:
            if tiles is not None:
                return self._read(tiles.gather(frames_TCHW), Part(memory.past, rims, tiles, keeps=keeps))
            return self._read(frames_TCHW, Whole(memory.past, rims, 1, grid if last else None, keeps=keeps))

        first, frames, latents = not memory.pending_TCHW, memory.take((frames_TCHW + 1) / 2), []
        while len(frames) > (0 if first else self.frames):
            last = len(frames) <= (1 if first else 2) * self.frames
            if not first:
                read(frames[: self.frames], memory.rims, keeps=True)
                frames = frames[self.frames :]
            latents.append(read(frames[:1].expand(self.frames, -1, -1, -1), memory.glance, keeps=False))
            first = False
        memory.keep(frames)
        return torch.cat(latents) if latents else None

    def _read(self, frames_TCHW: Tensor, run: Run) -> Tensor:
        """A latent frame of four pictures in [0, 1]."""
        x = F.relu(run.near(self.enter, frames_TCHW))
        for stage in self.stages:
            x = stage(x, run)
        return run.near(self.leave, x)


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
