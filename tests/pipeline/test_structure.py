"""Structure says where edges are, and nothing of brightness or colour."""

import pytest
import torch
from torch import Tensor

from pipeline.structure import CHANNELS, PARTS, structure


def square(inside: tuple[float, float, float], outside: tuple[float, float, float], left: int = 32) -> Tensor:
    """Eight equal pictures of 96 x 64 with a square of 32 pixels."""
    frames = torch.tensor(outside)[None, :, None, None].expand(8, 3, 64, 96).clone()
    frames[:, :, 16:48, left : left + 32] = torch.tensor(inside)[:, None, None]
    return frames


def test_a_latent_cell_has_the_edges_of_its_parts() -> None:
    edges = structure(square((1, 1, 1), (-1, -1, -1)), 4, 16)
    assert edges.shape == (2, CHANNELS, 4, 6)
    fine = torch.nn.functional.pixel_shuffle(edges, PARTS)[0, 0]
    assert fine.shape == (16, 24)
    assert fine[4:12, 8].min() > 0.7, "the left side of the square"
    assert fine[6:10, 10:14].max() == 0, "its inside"
    assert fine[:, :6].max() == 0
    assert edges.min() >= 0
    assert edges.max() <= 1


def test_a_dark_square_on_white_has_the_edges_of_a_white_one_on_dark() -> None:
    white, dark = (square(*pair) for pair in (((1, 1, 1), (-1, -1, -1)), ((-1, -1, -1), (1, 1, 1))))
    assert torch.equal(structure(white, 4, 16), structure(dark, 4, 16))


def test_brightness_alone_has_no_edges() -> None:
    ramp = torch.linspace(-1, 1, 96).expand(4, 3, 64, 96)
    assert structure(ramp, 4, 16).max() < 0.02
    assert structure(torch.full((4, 3, 64, 96), 0.3), 4, 16).max() == 0


@pytest.mark.parametrize("changed", [0, 1, 3])
def test_only_the_middle_picture_of_a_latent_frame_counts(changed: int) -> None:
    frames = square((1, 1, 1), (-1, -1, -1))
    before = structure(frames, 4, 16)
    frames[changed] = 0
    assert torch.equal(structure(frames, 4, 16), before)
    frames[2] = 0
    assert not torch.equal(structure(frames, 4, 16), before)
