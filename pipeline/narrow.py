"""Networks that are held in fewer bytes than they compute in, or elsewhere, filled tensor by tensor.

A linear layer may be held in bytes with a scale for each row; a layer may compute in another precision, or on another
device, than it is held in. Knows no model and no file.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F


class EightBitLinear(nn.Module):
    """A layer whose weights are bytes with a scale for each row: half of bfloat16's room, at a small loss."""

    def __init__(self, weight: Tensor, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        scale = weight.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
        self.register_buffer("weight", (weight.float() / scale).round().to(torch.int8), persistent=False)
        self.register_buffer("scale", scale[:, 0], persistent=False)
        self.bias = bias
        self.weight: Tensor
        self.scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        out = F.linear(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)
        return out if self.bias is None else out + self.bias


class Copied(nn.Module):
    """A layer whose weights are copied while it runs: onto the device, and into the precision, in which it computes.

    dtype: of the copies; None: as they are held. What is held in bytes stays so.
    """

    def __init__(self, layer: nn.Module, device: torch.device, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.layer, self.device, self.dtype = layer, device, dtype

    def forward(self, *inputs: Any, **named: Any) -> Any:
        copies = {name: value.to(self.device, self.dtype) for name, value in self.layer.named_parameters()}
        copies |= {name: value.to(self.device) for name, value in self.layer.named_buffers()}
        return functional_call(self.layer, copies, inputs, named)


def fill(
    network: nn.Module,
    weights: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    *,
    bits: int = 16,
    inside: str = "",
    device: str | torch.device = "cpu",
) -> None:
    """Give a network on the meta device its weights, which have to be just those of its state dict.

    bits: 8 holds its linear layers, those whose names begin with `inside`, in bytes. Each tensor is narrowed as it
    comes, so no more than one of them is there in the precision of its file.
    """
    layers = {
        f"{name}.weight": layer
        for name, layer in network.named_modules()
        if bits == 8 and type(layer) is nn.Linear and name.startswith(inside)
    }
    values = {}
    for name, value in weights:
        if name in layers:
            parent, _, last = name.removesuffix(".weight").rpartition(".")
            narrow = EightBitLinear(value.to(device), layers[name].bias)
            setattr(network.get_submodule(parent), last, narrow)
        else:
            # Copied, since what a file is mapped to is read again from the disk when memory is short, and lies askew
            # in memory, which changes the last bits of what is reckoned.
            values[name] = value.to(device, dtype, copy=True)
    network.load_state_dict(values, assign=True)
