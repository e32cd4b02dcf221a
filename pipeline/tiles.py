"""Chosen tiles of a picture: cut them out into a column, put a column back.

A tile is `config.TILE_PIXELS` high and wide. In pixels, latent cells or tokens, the same choice serves all.
Knows nothing of why a tile was chosen.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Tiles:
    """index_N: the chosen tiles, ascending, counted row by row over a grid of rows x columns."""

    index_N: Tensor
    rows: int
    columns: int

    @classmethod
    def of(cls, mask_HW: np.ndarray, device: torch.device | str = "cpu") -> "Tiles":
        return cls(torch.from_numpy(np.flatnonzero(mask_HW)).to(device), *mask_HW.shape)

    def __len__(self) -> int:
        return len(self.index_N)

    def gather(self, x: Tensor) -> Tensor:
        """(..., H, W) to a column of the chosen tiles, (..., n * tile height, tile width)."""
        y, x_N = self._places()
        return self._split(x)[..., y, x_N, :, :].flatten(-3, -2)

    def scatter(self, column: Tensor, into: Tensor) -> None:
        """Overwrite the chosen tiles of `into`, (..., H, W), with a column of them."""
        y, x_N = self._places()
        self._split(into)[..., y, x_N, :, :] = column.unflatten(-2, (len(self), -1))

    def _split(self, x: Tensor) -> Tensor:
        """A view of (..., H, W) by tiles, (..., rows, columns, tile height, tile width)."""
        return x.unflatten(-1, (self.columns, -1)).unflatten(-3, (self.rows, -1)).transpose(-3, -2)

    def _places(self) -> tuple[Tensor, Tensor]:
        return self.index_N // self.columns, self.index_N % self.columns

    def whole(self, column: Tensor) -> tuple[int, int]:
        """Height and width of the picture that a column was cut from."""
        height, width = column.shape[-2:]
        return height // len(self) * self.rows, width * self.columns

    def wider(self, rings: int) -> "Tiles":
        """With so many rings of neighbours around each."""
        chosen = torch.zeros(1, self.rows * self.columns, device=self.index_N.device)
        chosen[0, self.index_N] = 1
        grown = F.max_pool2d(chosen.view(1, self.rows, self.columns), 2 * rings + 1, 1, rings)
        return Tiles(grown.flatten().nonzero()[:, 0], self.rows, self.columns)

    def among(self, wider: "Tiles", column: Tensor) -> Tensor:
        """The column of these tiles, out of one of tiles that hold all of them."""
        place = torch.searchsorted(wider.index_N, self.index_N)
        return column.unflatten(-2, (len(wider), -1)).index_select(-3, place).flatten(-3, -2)

    def tokens(self, grid: tuple[int, int]) -> Tensor:
        """Which tokens of a latent frame a column is made of, in its order."""
        rows, columns = grid
        return self.gather(torch.arange(rows * columns, device=self.index_N.device).view(grid)).flatten()
