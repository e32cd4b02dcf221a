"""Tiny checkpoints as their makers publish them: their names, wrappers and kinds of file."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline.models import Family

# Diffusers' names -> those of Wan's own code, by hand: a test compares the way back with diffusers' own converter.
OWN = (
    (r"^condition_embedder\.time_embedder\.linear_1\.", "time_embedding.0."),
    (r"^condition_embedder\.time_embedder\.linear_2\.", "time_embedding.2."),
    (r"^condition_embedder\.time_proj\.", "time_projection.1."),
    (r"^condition_embedder\.text_embedder\.linear_1\.", "text_embedding.0."),
    (r"^condition_embedder\.text_embedder\.linear_2\.", "text_embedding.2."),
    (r"^proj_out\.", "head.head."),
    (r"^scale_shift_table$", "head.modulation"),
    (r"\.scale_shift_table$", ".modulation"),
    (r"\.attn1\.", ".self_attn."),
    (r"\.attn2\.", ".cross_attn."),
    (r"\.to_out\.0\.", ".o."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.norm2\.", ".norm3."),
    (r"\.ffn\.net\.0\.proj\.", ".ffn.0."),
    (r"\.ffn\.net\.2\.", ".ffn.2."),
)


def own_layout(weights: Mapping[str, Tensor], before: str = "") -> dict[str, Tensor]:
    named = {}
    for name, value in weights.items():
        for pattern, theirs in OWN:
            name = re.sub(pattern, theirs, name)
        named[before + name] = value.clone()
    return named


def other(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same names with other numbers: what must not be taken by mistake."""
    return {name: value + 1 for name, value in weights.items()}


def publish(row: Family, weights: Mapping[str, Tensor], folder: Path) -> Path:
    """A family's checkpoint, in its own file layout. weights: under diffusers' names."""
    path = folder / row.files[0]
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = own_layout(weights, "model.")
    wrapped: dict[str, Any]
    match row.name:
        case "self-forcing":
            wrapped = {"generator": other(plain), "critic": other(plain), "generator_ema": plain}
        case "causal-forcing":
            wrapped = {"generator": own_layout(weights, "model._fsdp_wrapped_module."), "critic": other(plain)}
        case "causal-forcing-frame" | "causal-forcing-2step" | "causal-forcing-1step":
            inside = {
                re.sub(r"^(model\.blocks\.\d+\.)", r"\1_fsdp_wrapped_module._checkpoint_wrapped_module.", name): value
                for name, value in plain.items()
            }
            wrapped = {"generator_ema": inside, "generator": other(inside)}
        case "streamdiffusion-v2" | "streamdiffusion-v2-14b":
            wrapped = {"generator": own_layout(weights)}
        case "krea-realtime":
            save_file(plain, path)
            return path
        case "reward-forcing":
            wrapped = dict(plain)
        case "longlive":
            wrapped = {"generator": plain}
        case name:
            raise AssertionError(f"nobody has said what a checkpoint of {name} looks like")
    torch.save(wrapped, path)
    return path


def peft_lora(layers: list[str], sizes: Mapping[str, torch.Size], rank: int = 3) -> dict[str, Tensor]:
    """Low-rank weights of these layers (diffusers' names) as PEFT names them on Wan's own code."""
    torch.manual_seed(5)
    named = {}
    for layer in layers:
        rows, columns = sizes[f"{layer}.weight"]
        theirs = next(iter(own_layout({f"{layer}.weight": torch.zeros(())}))).removesuffix(".weight")
        named[f"base_model.model.{theirs}.lora_A.weight"] = torch.randn(rank, columns) * 0.1
        named[f"base_model.model.{theirs}.lora_B.weight"] = torch.randn(rows, rank) * 0.1
    return named
