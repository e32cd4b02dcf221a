"""Low-rank adaptation: the weights stay, and beside each linear layer two thin ones learn what to add to it.

Written out rather than taken from peft, which brings transformers and with it a second more at every start of the
engine. Source: LoRA (Hu et al. 2021). Knows nothing of what is trained, nor of how it is shared between processes.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.training.settings import LoraSettings

LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")


class Adapted(nn.Linear):
    """A linear layer with its own frozen weights and `up @ down * scale` added. Begins as what it was."""

    def __init__(self, base: nn.Linear, settings: LoraSettings) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.down = nn.Linear(base.in_features, settings.rank, bias=False)
        self.up = nn.Linear(settings.rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)
        self.scale = settings.alpha / settings.rank

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + self.up(self.down(x)) * self.scale

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        base = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        base.weight = nn.Parameter(self.weight + self.up.weight @ self.down.weight * self.scale, requires_grad=False)
        base.bias = self.bias
        return base


class Adapters(nn.Module):
    """What learns, alone: the thin layers of a model under the names of the layers they stand beside.

    They are the model's own, so training these trains the model, and a checkpoint holds nothing else.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        for name, layer in model.named_modules():
            if isinstance(layer, Adapted):
                self.add_module(name.replace(".", "_"), nn.ModuleDict({"down": layer.down, "up": layer.up}))


def adapt(model: nn.Module, settings: LoraSettings) -> None:
    """Freeze all weights and put thin layers beside the linear ones of attention and feed-forward."""
    model.requires_grad_(False)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name.endswith(LAYERS):
            model.set_submodule(name, Adapted(layer, settings))


def merge(model: nn.Module) -> None:
    """Add what was learnt to the weights and take the thin layers away."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, Adapted):
            model.set_submodule(name, layer.merged())
