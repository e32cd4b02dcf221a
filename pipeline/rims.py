"""Chosen tiles through a network of convolutions, each layer computing these alone.

A 3x3 window that stands in one tile sees no more of another than the cells along its edges, its rim. So every layer
remembers the rims of what it was given, for all tiles as they were last computed, and a held neighbour is seen by its
rim: nothing is computed around a tile. Frames of one latent frame are told apart, since a network draws each of them
differently; of a held tile the newest latent frame's stand for all that follow. What a network itself remembers, the
frame before, is kept whole and changes where tiles are computed. Knows no network.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config import TILE_PIXELS
from pipeline.tiles import Tiles

MOST = 0.7  # share of tiles above which a whole picture is as quick


class Run(Protocol):
    """What the layers of a network see in one run beyond what they are given, of whole pictures or of a column.

    They ask in the same order each time. past: (C, H, W), of each that reads the frame before, what it was given last;
    none at a stream's start. rims: (frames of a latent frame, tiles + 1, cells of a rim, C), of each that sees its
    neighbours; the last tile is zeros, as is what lies outside of a picture. Both belong to a stream.
    """

    def near(self, layer: nn.Conv2d, x_TCHW: Tensor, grow: int = 1) -> Tensor:
        """A 3x3 convolution, whose input is made `grow` times as large before."""

    def before(self, x_TCHW: Tensor) -> Tensor:
        """The frame before these, (C, H, W), zeros at a stream's start. The newest of these takes its place."""


class Whole:
    """A run over whole pictures. grid: rows and columns of tiles whose rims are remembered, None: of no tile.

    keeps: whether its frames come before those of the next run.
    """

    def __init__(
        self,
        past: list[Tensor],
        rims: list[Tensor],
        latent_frames: int,
        grid: tuple[int, int] | None = None,
        *,
        keeps: bool = True,
    ) -> None:
        self._past, self._rims, self._latent_frames, self._grid, self._keeps = past, rims, latent_frames, grid, keeps
        self._before = iter(tuple(past))
        rims.clear()
        if keeps:
            past.clear()

    def near(self, layer: nn.Conv2d, x_TCHW: Tensor, grow: int = 1) -> Tensor:
        if self._grid is not None:
            self._rims.append(cut_rims(x_TCHW[-(len(x_TCHW) // self._latent_frames) :], self._grid))
        return layer(x_TCHW if grow == 1 else F.interpolate(x_TCHW, scale_factor=grow))

    def before(self, x_TCHW: Tensor) -> Tensor:
        before = next(self._before, None)
        if self._keeps:
            self._past.append(x_TCHW[-1].clone())
        return torch.zeros_like(x_TCHW[0]) if before is None else before


class Part:
    """A run over a column of tiles, after one over whole pictures that remembered rims."""

    def __init__(self, past: list[Tensor], rims: list[Tensor], tiles: Tiles, *, keeps: bool = True) -> None:
        assert rims, "chosen tiles need neighbours that were computed"
        self._past, self._rims, self._tiles, self._keeps = iter(past), iter(rims), tiles, keeps
        self._halos: dict[int, Halo] = {}

    def near(self, layer: nn.Conv2d, x_TCHW: Tensor, grow: int = 1) -> Tensor:
        held, count, size = next(self._rims), len(self._tiles), x_TCHW.shape[-1]
        if size not in self._halos:
            self._halos[size] = Halo.of(self._tiles, size)
        halo = self._halos[size]
        x_TNHWC = x_TCHW.permute(0, 2, 3, 1).unflatten(1, (count, size))
        own = x_TNHWC.flatten(2, 3).index_select(2, halo.rim)
        theirs = held.flatten(1, 2).index_select(1, halo.held).repeat(len(x_TCHW) // len(held), 1, 1)
        around = torch.where(halo.computed, own.flatten(1, 2).index_select(1, halo.own), theirs)
        held.index_copy_(1, self._tiles.index_N, own[-len(held) :].detach())
        seen = x_TNHWC.new_empty(len(x_TCHW), count, size + 2, size + 2, x_TNHWC.shape[-1])
        seen[:, :, 1:-1, 1:-1] = x_TNHWC
        seen.flatten(2, 3).index_copy_(2, halo.edge, around.unflatten(1, (count, -1)))
        wide = seen.flatten(0, 1).permute(0, 3, 1, 2)
        if grow > 1:
            wide = F.interpolate(wide, scale_factor=grow)[:, :, grow - 1 : 1 - grow, grow - 1 : 1 - grow]
        made = F.conv2d(wide, layer.weight, layer.bias, layer.stride)
        return made.unflatten(0, (-1, count)).transpose(1, 2).flatten(2, 3)

    def before(self, x_TCHW: Tensor) -> Tensor:
        held = next(self._past)
        before = self._tiles.gather(held)
        if self._keeps:
            self._tiles.scatter(x_TCHW[-1], held)
        return before


def cut_rims(x_TCHW: Tensor, grid: tuple[int, int]) -> Tensor:
    """The rims of all tiles of whole frames, as a `Run` has them."""
    rows, columns = grid
    tiled = x_TCHW.unflatten(3, (columns, -1)).unflatten(2, (rows, -1)).permute(0, 2, 4, 3, 5, 1)
    frames, size, channels = len(x_TCHW), tiled.shape[3], tiled.shape[5]
    cut = x_TCHW.new_empty(frames, rows * columns + 1, 4 * size, channels)
    cut[:, -1] = 0
    sides = (tiled[:, :, :, 0], tiled[:, :, :, -1], tiled[..., 0, :], tiled[..., -1, :])
    parts = cut[:, :-1].unflatten(1, grid).unflatten(3, (4, size))
    for index, side in enumerate(sides):
        parts[:, :, :, index] = side.detach()
    return cut


@dataclass(frozen=True)
class Halo:
    """Where the cells around chosen tiles are found, tile by tile, in one row of cells or another.

    rim: the cells of a tile that make its rim. edge: of a tile with its halo those that are halo. own, held: where
    these are among the rims of the chosen tiles, and of all. computed: which of the two has them, (1, cells, 1).
    """

    rim: Tensor
    edge: Tensor
    own: Tensor
    held: Tensor
    computed: Tensor

    @classmethod
    def of(cls, tiles: Tiles, size: int) -> "Halo":
        index_N, rows, columns = tiles.index_N, tiles.rows, tiles.columns
        rim, edge, down, across, cell = (each.to(index_N.device) for each in _window(size))
        y, x = index_N[:, None] // columns + down, index_N[:, None] % columns + across
        inside = (y >= 0) & (y < rows) & (x >= 0) & (x < columns)
        there = torch.where(inside, y * columns + x, rows * columns)
        place = torch.full((rows * columns + 1,), -1, device=index_N.device)
        place[index_N] = torch.arange(len(index_N), device=index_N.device)
        which, cells = place[there], len(rim)
        own, held = which.clamp(min=0) * cells + cell, there * cells + cell
        return cls(rim, edge, own.flatten(), held.flatten(), (which >= 0).flatten()[None, :, None])


@lru_cache(maxsize=16)
def _window(size: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """For tiles of this size: `rim` and `edge` of `Halo`; of each halo cell the tile that it lies in, as steps down and
    across, and its place in that tile's rim."""
    line, wide = range(size), size + 2
    rim = [(0, x) for x in line] + [(size - 1, x) for x in line]
    rim += [(y, 0) for y in line] + [(y, size - 1) for y in line]
    place = {at: index for index, at in enumerate(rim)}
    halo = [(y, x) for y in range(wide) for x in range(wide) if not (0 < y <= size and 0 < x <= size)]
    down, across = ([(each[axis] + size - 1) // size - 1 for each in halo] for axis in (0, 1))
    cell = [place[(y - 1) % size, (x - 1) % size] for y, x in halo]
    rim_cells, edge = [y * size + x for y, x in rim], [y * wide + x for y, x in halo]
    return tuple(torch.tensor(each) for each in (rim_cells, edge, down, across, cell))  # type: ignore[return-value]


def grid_of(x_TCHW: Tensor, stride: int = 1) -> tuple[int, int]:
    """Rows and columns of tiles in pictures, or in what has one cell for so many pixels along each side."""
    height, width = (size * stride for size in x_TCHW.shape[-2:])
    assert not height % TILE_PIXELS and not width % TILE_PIXELS, f"{width}x{height} does not divide into tiles"
    return height // TILE_PIXELS, width // TILE_PIXELS


def pays(tiles: Tiles) -> bool:
    """Whether so many tiles alone are quicker than all of a picture."""
    return len(tiles) <= MOST * tiles.rows * tiles.columns
