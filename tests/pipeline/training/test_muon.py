"""Cut matrices take the steps that whole ones take with torch's own Muon."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from pipeline.training.muon import CutMuon, orthogonal
from pipeline.training.parallel import Ranks, joined


@pytest.fixture
def alone() -> Iterator[Ranks]:
    with joined("cpu") as ranks:
        yield ranks


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_a_cut_matrix_goes_the_way_of_a_whole_one(alone: Ranks, shape: tuple[int, int]) -> None:
    draw = torch.Generator().manual_seed(1)
    start = torch.randn(shape, generator=draw)
    whole = nn.Parameter(start.clone())
    cut = nn.Parameter(distribute_tensor(start.clone(), alone.mesh, [Shard(0)], src_data_rank=None))
    theirs = torch.optim.Muon([whole], 0.02, 0.1, adjust_lr_fn="match_rms_adamw")
    ours = CutMuon([cut], 0.02, 0.1)
    for _ in range(4):
        gradient = torch.randn(shape, generator=draw)
        whole.grad = gradient
        cut.grad = distribute_tensor(gradient, alone.mesh, [Shard(0)], src_data_rank=None)
        theirs.step()
        ours.step()
    assert isinstance(cut, DTensor)
    torch.testing.assert_close(cut.full_tensor(), whole, atol=1e-6, rtol=1e-6)
    assert (whole - start).abs().max() > 0.02


def test_a_step_has_about_equal_size_in_every_direction() -> None:
    step = orthogonal(torch.randn(16, 40, generator=torch.Generator().manual_seed(2)), 0.1)
    sizes = torch.linalg.svdvals(step) / (0.1 * 0.2 * 40**0.5)
    assert sizes.min() > 0.6
    assert sizes.max() < 1.3


def test_a_matrix_without_a_gradient_stays(alone: Ranks) -> None:
    cut = nn.Parameter(distribute_tensor(torch.ones(4, 4), alone.mesh, [Shard(0)], src_data_rank=None))
    CutMuon([cut], 0.1, 0.1).step()
    assert torch.equal(cut.full_tensor(), torch.ones(4, 4))  # type: ignore[attr-defined]
