"""Muon for matrices that are cut between processes: each gathers a matrix's step, makes it orthogonal, keeps its part.

What is orthogonal is a property of a whole matrix, so the part that a process holds is not enough. Momentum stays cut,
as the weights are; only the direction is whole, one matrix at a time, and every process reckons it for itself. The
orthogonalisation is that of `torch.optim.Muon`. Knows nothing of what is trained.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

MOMENTUM = 0.95


class CutMuon(torch.optim.Optimizer):
    """As `torch.optim.Muon` with Nesterov's momentum and steps of AdamW's size, for DTensors."""

    def __init__(self, matrices: Iterable[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(matrix)
                momentum = state["momentum_buffer"].lerp_(matrix.grad, 1 - MOMENTUM)
                change = orthogonal(matrix.grad.lerp(momentum, MOMENTUM).full_tensor(), group["lr"])
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(_as(matrix, change))


def orthogonal(direction: Tensor, lr: float) -> Tensor:
    """What `torch.optim.Muon` would add to a matrix whose direction of descent this is, at this learning rate."""
    blank = nn.Parameter(torch.zeros_like(direction))
    blank.grad = direction
    torch.optim.Muon([blank], lr, 0.0, momentum=0.0, nesterov=False, adjust_lr_fn="match_rms_adamw").step()
    return blank.detach()


def _as(matrix: DTensor, whole: Tensor) -> DTensor:
    return distribute_tensor(whole, matrix.device_mesh, matrix.placements, src_data_rank=None)
