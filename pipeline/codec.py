"""The pocket autoencoder and its streaming form.

One latent frame carries `frames` pictures. The encoder reads those pictures alone; the decoder also reads the latent
frame before, so motion runs on across the border. Every layer looks at a small neighbourhood only (channel norms, no
spatial statistics), so a tile that does not change decodes to the same pixels wherever the rest moves. How a layer sees
beyond the edge of what is computed is decided by the `near` object handed in: a whole picture has nothing there, chosen
tiles have what their neighbours held when they were last computed (`TileMemory`).
Knows nothing of time steps, prompts or the transformer.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config import CodecConfig
from pipeline.tiles import Tiles

Near = Callable[[nn.Conv2d, Tensor], Tensor]


class Memory(Protocol):
    """What one direction of a stream's codec remembers."""

    def reset(self) -> None: ...
    def forget_tiles(self) -> None:
        """The next chunk is whole, and nothing of a part of one is kept for it."""


class Codec(Protocol):
    """What the engine asks of a codec. Pictures are floats in [-1, 1], (T, 3, H, W); latents (T, C, h, w).

    Of chosen tiles columns come and go (`Tiles`). Whether fewer tiles cost less is the codec's own affair. A memory is
    what the same codec's `remember` gave.
    """

    def place(self, device: torch.device) -> Self: ...
    def remember(self) -> Memory: ...
    def encode_push(self, memory: Any, frames_TCHW: Tensor) -> Tensor | None: ...
    def encode_tiles(self, memory: Any, frames_TCHW: Tensor, tiles: Tiles | None) -> Tensor: ...
    def decode_push(self, memory: Any, latents_TCHW: Tensor) -> Tensor: ...
    def decode_tiles(self, memory: Any, latents_TCHW: Tensor, tiles: Tiles | None) -> Tensor:
        """latents_TCHW: whole; the pictures of the tiles alone come back."""


def alone(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """A layer that sees all there is."""
    return layer(x)


class ChannelNorm(nn.Module):
    """Root-mean-square norm over channels at each position."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6) * self.gain


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.second.weight)

    def forward(self, x: Tensor, near: Near = alone) -> Tensor:
        return x + near(self.second, F.silu(near(self.first, self.norm(x))))


class RunningNorm(nn.BatchNorm2d):
    """Normalises by its running statistics, in training too: a batch's own would hide how bright its pictures are."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        if self.training:
            with torch.no_grad():
                variance, mean = torch.var_mean(x.float(), (0, 2, 3))
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance, self.momentum)
        return F.batch_norm(x, self.running_mean, self.running_var, eps=self.eps)


def _encoder(config: CodecConfig) -> nn.Sequential:
    narrow, middle, wide = config.widths
    patch = config.spatial_stride // 4
    return nn.Sequential(
        nn.PixelUnshuffle(patch),
        nn.Conv2d(3 * config.frames * patch * patch, narrow, 1),
        Residual(narrow),
        nn.PixelUnshuffle(2),
        nn.Conv2d(4 * narrow, middle, 1),
        Residual(middle),
        Residual(middle),
        nn.PixelUnshuffle(2),
        nn.Conv2d(4 * middle, wide, 1),
        Residual(wide),
        Residual(wide),
        nn.Conv2d(wide, config.latent_channels, 1),
    )


def _decoder(config: CodecConfig) -> nn.Sequential:
    narrow, middle, wide = config.widths
    patch = config.spatial_stride // 4
    return nn.Sequential(
        nn.Conv2d(2 * config.latent_channels, wide, 3, padding=1),
        Residual(wide),
        Residual(wide),
        Residual(wide),
        nn.Conv2d(wide, 4 * middle, 1),
        nn.PixelShuffle(2),
        Residual(middle),
        Residual(middle),
        Residual(middle),
        nn.Conv2d(middle, 4 * narrow, 1),
        nn.PixelShuffle(2),
        Residual(narrow),
        Residual(narrow),
        nn.Conv2d(narrow, 3 * config.frames * patch * patch, 3, padding=1),
        nn.PixelShuffle(patch),
    )


def _run(layers: nn.Sequential, x: Tensor, near: Near = alone) -> Tensor:
    """In the layers' own precision; single comes back."""
    x = x.to(next(layers.parameters()).dtype).contiguous(memory_format=torch.channels_last)
    if near is alone:
        return layers(x).float()  # as a whole, which training compiles
    for layer in layers:
        if isinstance(layer, Residual):
            x = layer(x, near)
        else:
            x = near(layer, x) if isinstance(layer, nn.Conv2d) else layer(x)
    return x.float()


class TileMemory:
    """What each layer that looks at its neighbours saw of every tile: a `near` for whole chunks and for chosen tiles.

    A whole chunk is computed as ever and remembered. Of chosen tiles each layer computes their own part and reads what
    lies around them here, as it was when it was last computed: nothing is computed twice, and a held neighbour is seen
    as it is shown. maps: (T, H + 2, W + 2, C) in the order in which the layers ask, with a border of zeros. wholes:
    what the layers saw of a whole chunk, as it came; it goes into the maps once chosen tiles follow, which where
    everything moves they never do.
    """

    def __init__(self) -> None:
        self.maps: list[Tensor] = []
        self.wholes: list[Tensor] = []
        self.valid = False
        self._last: Tiles | None = None

    def begin(self, tiles: Tiles | None) -> Near:
        """For one run over a chunk: of these tiles, (T * n, C, h, w), or of all, (T, C, H, W)."""
        assert tiles is None or self.valid, "chosen tiles need neighbours that were computed"
        before, self._last, self.valid, place = self._last, tiles, True, iter(range(1 << 20))
        held = before if before is None or tiles is None else without(before, tiles)
        wholes = [] if tiles is None else self.wholes
        self.wholes = []
        known: dict[tuple[str, int], Tensor] = {}

        def cells(of: Tiles, size: int, width: int, which: str) -> Tensor:
            """Where in a map the cells of these tiles are, tile by tile."""
            if (which, size) not in known:
                y, x = of.index_N // of.columns * size + 1, of.index_N % of.columns * size + 1
                step = torch.arange(size, device=y.device)
                rows, columns = y[:, None, None] + step[:, None], x[:, None, None] + step
                known[which, size] = (rows * width + columns).flatten()
            return known[which, size]

        def around(own: Tensor, size: int, width: int) -> Tensor:
            """The same of each cell's nine neighbours."""
            if ("around", size) not in known:
                step = torch.arange(-1, 2, device=own.device)
                known["around", size] = (own[:, None, None] + step[:, None] * width + step).flatten()
            return known["around", size]

        def map_of(index: int) -> Tensor:
            if before is None:  # the chunk before was whole, and its newest frame stands for every frame
                whole_TCHW = wholes[index]
                count, channels, height, width = whole_TCHW.shape
                if index == len(self.maps):
                    self.maps.append(whole_TCHW.new_zeros(count, height + 2, width + 2, channels))
                self.maps[index][:, 1:-1, 1:-1] = whole_TCHW[-1].permute(1, 2, 0)
            return self.maps[index]

        def whole(layer: nn.Conv2d, x: Tensor) -> Tensor:
            if layer.kernel_size != (1, 1):
                self.wholes.append(x)
            return layer(x)

        def chosen(layer: nn.Conv2d, x: Tensor) -> Tensor:
            if layer.kernel_size == (1, 1):
                return layer(x)
            assert tiles is not None
            seen, size = map_of(next(place)), x.shape[-1]
            (count, _, width, channels), flat = seen.shape, seen.flatten(1, 2)
            if held is not None and len(held):  # computed a chunk ago and held now
                stale = cells(held, size, width, "stale")
                flat[:-1].index_copy_(1, stale, flat[-1:].index_select(1, stale).expand(count - 1, -1, -1))
            own = cells(tiles, size, width, "own")
            flat.index_copy_(1, own, x.permute(0, 2, 3, 1).reshape(count, -1, channels))
            # The convolution as one product: a library's own is slow on many small pictures.
            columns = flat.index_select(1, around(own, size, width)).view(-1, 9 * channels)
            made = F.linear(columns, layer.weight.permute(0, 2, 3, 1).flatten(1), layer.bias)
            return made.view(-1, size, size, len(layer.weight)).permute(0, 3, 1, 2)

        return whole if tiles is None else chosen

    def reset(self) -> None:
        self.valid = False
        self.wholes = []


def without(tiles: Tiles, others: Tiles) -> Tiles:
    """Those of the tiles that the others are not."""
    return replace(tiles, index_N=tiles.index_N[~torch.isin(tiles.index_N, others.index_N)])


@dataclass
class PicturesPending:
    """Pictures of a stream that do not fill a latent frame yet."""

    pending_TCHW: list[Tensor] = field(default_factory=list)

    def take(self, frames_TCHW: Tensor) -> Tensor:
        """All that is pending, these pictures last."""
        return torch.cat([*self.pending_TCHW, frames_TCHW])

    def keep(self, frames_TCHW: Tensor) -> None:
        self.pending_TCHW[:] = [frames_TCHW] if len(frames_TCHW) else []

    def reset(self) -> None:
        self.pending_TCHW.clear()


@dataclass
class CodecMemory(PicturesPending):
    """What one stream's codec remembers: pending pictures, the last decoded latent, and what its layers saw, once tiles
    are chosen."""

    previous_CHW: Tensor | None = None
    layers: TileMemory = field(default_factory=TileMemory, compare=False)

    def reset(self) -> None:
        super().reset()
        self.previous_CHW = None
        self.layers.reset()

    def forget_tiles(self) -> None:
        self.layers.reset()


class PocketCodec(nn.Module):
    """Pictures: float in [-1, 1], (B, T, 3, H, W). Latents: about unit normal, (B, T / frames, C, H / s, W / s)."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = _encoder(config)
        self.decoder = _decoder(config)
        # Not affine: its running statistics are the latents' mean and deviation, learnt with the weights.
        self.normalise = RunningNorm(config.latent_channels, affine=False, momentum=0.01)
        # How much of the picture hangs on a channel: noise then hides fine detail first and the layout last.
        self.register_buffer("scale", torch.ones(config.latent_channels, 1, 1))
        self.scale: Tensor

    def place(self, device: torch.device) -> Self:
        """On a device, laid out as its convolutions are quickest."""
        return self.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def narrow(self) -> Self:
        """From now on in bfloat16. On a CPU with tiles for it (AMX) a third of the time, and 57 dB from the same in
        single precision."""
        self.encoder.bfloat16()
        self.decoder.bfloat16()
        return self

    def remember(self) -> CodecMemory:
        return CodecMemory()

    def encode(self, frames_BTCHW: Tensor) -> Tensor:
        """T must be a multiple of `frames`. Returns latents_BTCHW."""
        batch, count, _, height, width = frames_BTCHW.shape
        assert count % self.config.frames == 0, f"{count} frames do not fill latent frames of {self.config.frames}"
        grouped = frames_BTCHW.reshape(-1, 3 * self.config.frames, height, width)
        latents = self.normalise(_run(self.encoder, grouped)) * self.scale
        return latents.reshape(batch, count // self.config.frames, *latents.shape[1:])

    def decode(self, latents_BTCHW: Tensor, previous_BCHW: Tensor | None = None) -> Tensor:
        """`previous_BCHW` is the latent frame before the first one; without it the first stands for its own past."""
        batch, count = latents_BTCHW.shape[:2]
        before = latents_BTCHW[:, 0] if previous_BCHW is None else previous_BCHW
        past = torch.cat([before[:, None], latents_BTCHW[:, :-1]], 1)
        pair = torch.cat([latents_BTCHW / self.scale, past / self.scale], 2).flatten(0, 1)
        frames = _run(self.decoder, pair)
        return frames.reshape(batch, count * self.config.frames, 3, *frames.shape[2:])

    def encode_push(self, memory: CodecMemory, frames_TCHW: Tensor) -> Tensor | None:
        """Take any number of pictures; return the latent frames they complete (T, C, h, w), or None: needs more."""
        frames = memory.take(frames_TCHW)
        whole = len(frames) // self.config.frames * self.config.frames
        memory.keep(frames[whole:])
        return self.encode(frames[None, :whole])[0] if whole else None

    def encode_tiles(self, memory: CodecMemory, frames_TCHW: Tensor, tiles: Tiles | None) -> Tensor:
        """Latents of a chunk of whole latent frames, (T, C, h, w), a column of the tiles where some are chosen.

        tiles: None is all of them, remembered for chunks of which a part is encoded.
        """
        assert not memory.pending_TCHW, "chosen tiles are encoded in whole latent frames"
        made = self._tiled(self.encoder, frames_TCHW.unflatten(0, (-1, self.config.frames)), memory.layers, tiles)
        return self.normalise(made) * self.scale

    def decode_tiles(self, memory: CodecMemory, latents_TCHW: Tensor, tiles: Tiles | None) -> Tensor:
        """Decode the next latent frames of a stream, always whole; returns pictures, a column where tiles are chosen.

        tiles: None is all of them, remembered for chunks of which a part is decoded.
        """
        before = latents_TCHW[0] if memory.previous_CHW is None else memory.previous_CHW
        past = torch.cat([before[None], latents_TCHW[:-1]])
        memory.previous_CHW = latents_TCHW[-1].clone()
        pair = torch.cat([latents_TCHW / self.scale, past / self.scale], 1)
        made = self._tiled(self.decoder, pair, memory.layers, tiles)
        return made.unflatten(1, (self.config.frames, 3)).flatten(0, 1)

    def _tiled(self, layers: nn.Sequential, x: Tensor, memory: TileMemory, tiles: Tiles | None) -> Tensor:
        """Chosen tiles through layers that see their neighbours, to a column.

        x: (T, ..., H, W); what is between are channels, and joined where they are needed: that copies them.
        More than half are cut from a whole, and so are any whose neighbours were not computed before.
        """
        if tiles is None or not memory.valid or len(tiles) > tiles.rows * tiles.columns // 2:
            made = _run(layers, x.flatten(1, -3), memory.begin(None))
            return made if tiles is None else tiles.gather(made)
        near = memory.begin(tiles)
        column = tiles.gather(x).flatten(1, -3)
        batch = column.unflatten(2, (len(tiles), -1)).transpose(1, 2).flatten(0, 1)
        made = _run(layers, batch, near)
        return made.unflatten(0, (-1, len(tiles))).transpose(1, 2).flatten(2, 3)

    def decode_push(self, memory: CodecMemory, latents_TCHW: Tensor) -> Tensor:
        """Decode the next latent frames of a stream; returns pictures (T * frames, 3, H, W)."""
        previous = None if memory.previous_CHW is None else memory.previous_CHW[None]
        frames = self.decode(latents_TCHW[None], previous)[0]
        memory.previous_CHW = latents_TCHW[-1].clone()
        return frames


def multiplies_bfloat16() -> bool:
    """Whether this CPU has tiles for products of bfloat16 (AMX)."""
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # not in every version of torch
    return bool(capabilities.get("amx_bf16"))


def to_bytes(frames_TCHW: Tensor) -> Tensor:
    """[-1, 1] float -> uint8, the axes as they are."""
    return frames_TCHW.float().add(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)


def frames_to_pixels(frames_TCHW: Tensor) -> Tensor:
    """[-1, 1] float TCHW -> uint8 THWC."""
    return to_bytes(frames_TCHW).permute(0, 2, 3, 1).contiguous()


def pixels_to_frames(pixels_THWC: Tensor) -> Tensor:
    """uint8 THWC -> [-1, 1] float TCHW."""
    return from_bytes(pixels_THWC.permute(0, 3, 1, 2))


def from_bytes(pixels: Tensor) -> Tensor:
    """uint8 -> [-1, 1] float, the axes as they are."""
    return pixels.to(torch.float32).div_(127.5).sub_(1)
