"""Tiny checkpoints as their makers publish them: their names, wrappers and kinds of file."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline.family import Family
from pipeline.student import Student

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


def taehv(
    channels: int = 16, widths: tuple[int, int, int, int] = (256, 128, 64, 64), encoder_width: int = 64
) -> dict[str, Tensor]:
    """TAEHV's file for Wan 2.1: decoder and encoder, under the numbers of their layers."""
    generator, named = torch.Generator().manual_seed(6), {}

    def draw(name: str, *shape: int, bias: bool = True) -> None:
        scale = (2 / torch.Size(shape[1:]).numel()) ** 0.5
        named[f"{name}.weight"] = torch.randn(*shape, generator=generator) * scale
        if bias:
            named[f"{name}.bias"] = torch.randn(shape[0], generator=generator)

    def recall(row: str, start: int, width: int) -> None:
        for block in range(start, start + 3):
            for place, inputs in ((0, 2 * width), (2, width), (4, width)):
                draw(f"{row}.{block}.conv.{place}", width, inputs, 3, 3)

    draw("decoder.1", widths[0], channels, 3, 3)
    for index, growth in enumerate((1, 2, 2)):
        width, start = widths[index], 3 + 6 * index
        recall("decoder", start, width)
        draw(f"decoder.{start + 4}.conv", growth * width, width, 1, 1, bias=False)
        draw(f"decoder.{start + 5}", widths[index + 1], width, 3, 3, bias=False)
    # Pictures that are not all black and white.
    named |= {"decoder.22.weight": torch.randn(3, widths[3], 3, 3, generator=generator) / 3000}
    named |= {"decoder.22.bias": torch.full((3,), 0.5)}
    draw("encoder.0", encoder_width, 3, 3, 3)
    for index, shrinkage in enumerate((2, 2, 1)):
        start = 2 + 5 * index
        draw(f"encoder.{start}.conv", encoder_width, shrinkage * encoder_width, 1, 1, bias=False)
        draw(f"encoder.{start + 1}", encoder_width, encoder_width, 3, 3, bias=False)
        recall("encoder", start + 2, encoder_width)
    draw("encoder.17", channels, encoder_width, 3, 3)
    return named


def publish_folder(student: Student, folder: Path) -> Path:
    """A transformer's folder as AnyFlow's makers publish it: in pieces, and of a class of their own code."""
    folder.mkdir(parents=True, exist_ok=True)
    student.model.save_config(folder)
    told = json.loads((folder / "config.json").read_text()) | {"_class_name": "FAR_Wan_Transformer3DModel"}
    (folder / "config.json").write_text(json.dumps(told | {"init_far_model": True, "qk_norm": "rms_norm_across_heads"}))
    weights, pieces = student.model.state_dict(), {}
    for part in range(2):
        name = f"diffusion_pytorch_model-0000{part + 1}-of-00002.safetensors"
        held = {key: weights[key].contiguous() for key in sorted(weights)[part::2]}
        save_file(held, folder / name)
        pieces |= dict.fromkeys(held, name)
    index = {"metadata": {}, "weight_map": pieces}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return folder
