"""A column of tiles against the picture it was cut from."""

import numpy as np
import torch

from pipeline.tiles import Tiles

MASK = np.array([[0, 1, 0], [1, 0, 1]], bool)


def test_a_column_is_the_chosen_tiles_row_by_row() -> None:
    picture = torch.arange(2 * 4 * 6).view(2, 4, 6)
    column = Tiles.of(MASK).gather(picture)
    parts = [picture[:, 0:2, 2:4], picture[:, 2:4, 0:2], picture[:, 2:4, 4:6]]
    assert torch.equal(column, torch.cat(parts, 1))


def test_scattering_overwrites_the_chosen_tiles_and_nothing_else() -> None:
    picture, tiles = torch.zeros(2, 3, 4, 6), Tiles.of(MASK)
    drawn = torch.rand(2, 3, 4, 6) + 1
    tiles.scatter(tiles.gather(drawn), picture)
    chosen = torch.from_numpy(MASK).repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert torch.equal(picture, drawn * chosen)


def test_tiles_with_a_ring_around_them_hold_the_column_of_those_within() -> None:
    mask, wide = np.zeros((4, 5), bool), np.zeros((4, 5), bool)
    mask[0, 1] = mask[3, 4] = True
    wide[:2, :3] = wide[2:, 3:] = True
    picture, tiles = torch.rand(3, 8, 10), Tiles.of(mask)
    assert torch.equal(tiles.wider(1).index_N, Tiles.of(wide).index_N)
    assert torch.equal(tiles.wider(0).index_N, tiles.index_N)
    assert torch.equal(tiles.among(tiles.wider(1), tiles.wider(1).gather(picture)), tiles.gather(picture))


def test_a_column_knows_the_size_of_its_picture_and_its_tokens() -> None:
    tiles = Tiles.of(MASK)
    assert tiles.whole(tiles.gather(torch.zeros(8, 12))) == (8, 12)
    assert tiles.tokens((2, 3)).tolist() == [1, 3, 5]
    assert tiles.tokens((4, 6)).tolist() == [2, 3, 8, 9, 12, 13, 18, 19, 16, 17, 22, 23]
