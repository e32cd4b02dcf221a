"""Whether weights are those of a model: every name, every shape, no more and no less; and what differs, in a sentence.

Knows no files beyond their names in what it says.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from pipeline.bases import BASES
from pipeline.checkpoints import Weights
from pipeline.config import StudentConfig
from pipeline.errors import PipelineError
from pipeline.student import Student

# What only one kind of file has in its names.
_SIGNS = (
    ("vace_", "Wan VACE"),
    ("face_adapter", "Wan Animate"),
    ("image_embedder", "a Wan that takes pictures as prompts"),
    ("img_emb", "a Wan that takes pictures as prompts"),
    ("lora_", "low-rank weights (LoRA), which go on top of a model"),
    ("token_embedding", "a text encoder"),
    ("encoder.block.", "a text encoder"),
    ("decoder.", "an autoencoder"),
    ("double_blocks", "HunyuanVideo or Flux"),
)


def blank(shape: StudentConfig) -> Student:
    """A student without memory for its weights: for their names and shapes, or to be given some."""
    with torch.device("meta"):
        student = Student(shape)
    # The rotary tables are no weights, so nobody gives them back.
    rope = student.model.rope
    student.model.rope = type(rope)(rope.attention_head_dim, rope.patch_size, rope.max_seq_len)
    return student


def recognise(weights: Mapping[str, Tensor]) -> str | None:
    """What a file looks like, by its names and sizes."""
    for sign, title in _SIGNS:
        if any(sign in name for name in weights):
            return title
    patch, far = weights.get("patch_embedding.weight"), "far_patch_embedding.weight" in weights
    if patch is None:
        return None
    layers = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    for base in BASES.values():
        dim = base.shape.num_attention_heads * base.shape.attention_head_dim
        sizes = (dim, base.shape.in_channels, base.shape.num_layers)
        if sizes == (*patch.shape[:2], layers) and far == bool(base.shape.compressed_patch_size):
            return base.title
    kind = "an AnyFlow-FAR" if far else "an AnyFlow" if any("delta_embedder" in name for name in weights) else "a Wan"
    return f"{kind} of {layers} layers, {patch.shape[0]} wide, on {patch.shape[1]} channels"


def fit(weights: Weights, shape: StudentConfig, path: Path) -> Weights:
    """The same weights, if they are exactly those that the model has. Raises PipelineError (`checkpoint_mismatch`)."""
    wanted = blank(shape).model.state_dict()
    if told := difference(weights, wanted):
        looks, asked = recognise(weights), recognise(wanted)
        raise PipelineError(
            "checkpoint_mismatch",
            f"{path} does not fit: {told}." + (f" It looks like {looks}." if looks and looks != asked else ""),
            "Name the family that it belongs to, or fetch the file of this one.",
        )
    return weights


def difference(have: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> str:
    """What is missing, not known or of another shape; empty if nothing is."""
    shaped = [name for name in want if name in have and have[name].shape != want[name].shape]
    parts = [
        _some([name for name in want if name not in have], "missing"),
        _some([name for name in have if name not in want], "not known"),
        _some([f"{name}: {_size(have[name])}, not {_size(want[name])}" for name in shaped], "of another shape"),
    ]
    return ", ".join(filter(None, parts))


def _some(names: list[str], what: str) -> str:
    if not names:
        return ""
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return f"{len(names)} {'is' if len(names) == 1 else 'are'} {what} ({'; '.join(names[:2])}{more})"


def _size(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "one number"
