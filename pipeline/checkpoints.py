"""Checkpoints as people publish them -> weights under diffusers' names.

What is published is a pickle or safetensors, in one of a few wrappings, under the names of Wan's own code or of
diffusers. A pickle is only ever read as numbers: one that asks for code is refused. Knows no table of families, and not
which names a model needs.
"""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.errors import PipelineError

Weights = dict[str, Tensor]

ENTRIES = ("generator_ema", "generator", "ema", "model", "state_dict", "module")
"""Where a trainer's checkpoint keeps the weights that are meant for use, the best first."""

# What torch's wrappers put between the parts of a name, and what wrapping modules put before it.
_FRAGMENT = re.compile(r"(?:^|(?<=\.))(?:_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module)\.")
_BEFORE = re.compile(r"^(?:(?:base_model|model|module|generator|transformer|diffusion_model|unet)\.)+")

_ENDS = {
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "head.head": "proj_out",
}
# Wan calls the norm before cross-attention the third, diffusers the second; the other two have no weights in either.
_OF_A_BLOCK = {
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    **{
        f"{theirs}.{part}": f"{ours}.{other}"
        for theirs, ours in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for part, other in (
            ("q", "to_q"),
            ("k", "to_k"),
            ("v", "to_v"),
            ("o", "to_out.0"),
            ("norm_q", "norm_q"),
            ("norm_k", "norm_k"),
        )
    },
}
# What torch wrote before 1.6, and any other pickle. Safetensors may begin with the same byte, but open a brace after 8.
_OLD_PICKLE = re.compile(rb"\x80.{7}[^{]", re.DOTALL)
_BACK_ENDS = {ours: theirs for theirs, ours in _ENDS.items()}
_BACK_OF_A_BLOCK = {ours: theirs for theirs, ours in _OF_A_BLOCK.items()}
_BLOCK = re.compile(r"^(blocks\.\d+)\.(.+)$")


def plain_name(name: str) -> str:
    """Without what wrappers added."""
    return _BEFORE.sub("", _FRAGMENT.sub("", name))


def layer_name(name: str) -> str:
    """A layer's name in Wan's own code -> diffusers'; one that is diffusers' already stays."""
    if block := _BLOCK.match(name):
        return f"{block[1]}.{_OF_A_BLOCK.get(block[2], block[2])}"
    return _ENDS.get(name, name)


def own_name(layer: str) -> str:
    """The way back: a layer's name in diffusers -> in Wan's own code."""
    if block := _BLOCK.match(layer):
        return f"{block[1]}.{_BACK_OF_A_BLOCK.get(block[2], block[2])}"
    return _BACK_ENDS.get(layer, layer)


def weight_name(name: str) -> str:
    """A weight's published name -> diffusers'."""
    name = plain_name(name)
    if name == "modulation" or name.endswith(".modulation"):
        return name.removeprefix("head.").removesuffix("modulation") + "scale_shift_table"
    layer, _, kind = name.rpartition(".")
    return f"{layer_name(layer)}.{kind}" if layer else name


def read_checkpoint(path: Path) -> Mapping[str, Any]:
    """All that a file holds.

    Raises PipelineError: `checkpoint_missing`, `checkpoint_damaged`, `checkpoint_unsafe`.
    """
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise PipelineError(
            "checkpoint_missing", f"{path} cannot be read: {why}.", "Name a checkpoint, a .pt or .safetensors file."
        ) from error
    try:
        if start.startswith(b"PK"):
            held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        elif _OLD_PICKLE.match(start):
            with warnings.catch_warnings(action="ignore"):  # that it may be one of the others
                held = torch.load(path, map_location="cpu", weights_only=True)
        else:
            held = load_file(path)
    except UnpicklingError as error:
        raise _refused_pickle(path, error) from error
    except Exception as error:  # there is no end to what a torn pickle raises
        raise _damaged(path, "it ends early or is no checkpoint") from error
    if not isinstance(held, Mapping):
        raise _damaged(path, f"it holds a {type(held).__name__}, not weights under names")
    return held


def _refused_pickle(path: Path, error: UnpicklingError) -> PipelineError:
    asked = re.search(r"GLOBAL ([\w.]+)", str(error))
    if asked is None and "unsupported" not in str(error).lower():
        return _damaged(path, "it ends early or is no checkpoint")
    what = f"wants {asked[1]} to be run" if asked else "is a pickle that wants more than weights to be made"
    return PipelineError(
        "checkpoint_unsafe",
        f"{path} {what} while it is read, so it was not read.",
        "Ask its makers for safetensors, or for a checkpoint that holds nothing but weights.",
    )


def _damaged(path: Path, why: str) -> PipelineError:
    return PipelineError("checkpoint_damaged", f"{path} is damaged: {why}.", "Fetch it again.")


def unwrap(held: Mapping[str, Any], entry: str | None, path: Path) -> Weights:
    """The weights in a checkpoint, under diffusers' names.

    entry: which of its entries is meant; None: the best one there is. A checkpoint that is nothing but weights is taken
    as it is. Raises PipelineError (`checkpoint_mismatch`).
    """
    if any(isinstance(value, Tensor) for value in held.values()):
        chosen: Any = held
    else:
        chosen = next((held[name] for name in ([entry] if entry else ENTRIES) if name in held), None)
        if not isinstance(chosen, Mapping):
            wanted = repr(entry) if entry else "of " + ", ".join(ENTRIES)
            has = ", ".join(sorted(map(str, held))[:8]) or "nothing"
            raise _other(path, f"it has no entry {wanted}; it has {has}")
        return unwrap(chosen, None, path)
    weights: Weights = {}
    for name, value in chosen.items():
        if not isinstance(value, Tensor):
            raise _other(path, f"{name} is a {type(value).__name__}, not a tensor")
        ours = weight_name(name)
        if ours in weights:
            raise _other(path, f"two of its weights are both {ours}")
        weights[ours] = value
    return weights


def _other(path: Path, why: str) -> PipelineError:
    return PipelineError(
        "checkpoint_mismatch", f"{path} is not a checkpoint of this kind: {why}.", "Name the family that it belongs to."
    )
