"""Weights of a smaller student as those of a larger one that draws the same: where training begins when a model grows.

What is new begins as nothing: structure channels that nobody reads, a gate that is nearly shut, wider feed-forward
layers whose new units say nothing yet, further layers that hand their tokens on. Knows nothing of stages.
Source: function-preserving growth (Net2Net, Chen et al. 2016), as zero-initialised residual branches make it exact.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.config import ModelConfig
from pipeline.training.teacher import GATE_START, Denoiser

_EXITS = ("attn1.to_out.0", "attn2.to_out.0", "ffn.net.2")  # of a layer: where its branches join the tokens


def can_grow(theirs: ModelConfig, config: ModelConfig) -> bool:
    """Whether `config`'s student is that of `theirs` or a grown one: more layers, wider ones, structure, a gate."""
    small, size = theirs.student, config.student
    gate = int(config.sampler.prediction == "gated" and theirs.sampler.prediction == "clean")
    grown = replace(
        small,
        in_channels=small.in_channels + size.control_channels - small.control_channels,
        control_channels=max(small.control_channels, size.control_channels),
        out_channels=small.out_channels + gate,
        num_layers=max(small.num_layers, size.num_layers),
        ffn_dim=max(small.ffn_dim, size.ffn_dim),
    )
    return grown == size


def grow(weights: dict[str, Tensor], theirs: ModelConfig, config: ModelConfig) -> dict[str, Tensor]:
    """The weights of a `Student` of `theirs` as those of one of `config`, which `can_grow` has said yes to."""
    small, size = theirs.student, config.student
    grown = dict(weights)
    if control := size.control_channels - small.control_channels:
        name = "model.patch_embedding.weight"
        grown[name] = F.pad(grown[name], (0, 0, 0, 0, 0, 0, 0, control))
    if size.out_channels > small.out_channels:
        for part, start in (("weight", 0.0), ("bias", GATE_START)):
            name = f"model.proj_out.{part}"
            cells = grown[name].unflatten(0, (-1, small.out_channels))
            grown[name] = torch.cat([cells, torch.full_like(cells[:, :1], start)], 1).flatten(0, 1)
    if size.num_layers == small.num_layers and size.ffn_dim == small.ffn_dim:
        return grown
    for name, fresh in Denoiser(config).student.state_dict().items():
        leaves = name.removesuffix(".weight").removesuffix(".bias").endswith(_EXITS)
        if name not in grown:  # a further layer
            grown[name] = torch.zeros_like(fresh) if leaves else fresh
        elif grown[name].shape != fresh.shape:  # a wider feed-forward: its new units are heard by nobody yet
            wide = torch.zeros_like(fresh) if leaves else fresh.clone()
            wide[tuple(slice(length) for length in grown[name].shape)] = grown[name]
            grown[name] = wide
    return grown
