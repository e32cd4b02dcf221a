"""What a folder holds, without opening its weights: a whole model, or a transformer in diffusers' layout.

Beside a transformer may lie how it is run (RULE, a `ModelConfig`) and what its files' hashes are (RECORD). Knows
neither torch nor the table of families.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.config import StudentConfig
from pipeline.errors import PipelineError

RECORD = "checksums.json"
RULE = "stillstream.json"
_FAR: dict[str, Any] = {
    "compressed_patch_size": (1, 4, 4),
    "full_chunk_limit": 3,
    "gate_value": 0.25,
    "deltatime_type": "r",
}
_KINDS: dict[str, dict[str, Any]] = {
    "WanTransformer3DModel": dict.fromkeys(_FAR),
    "AnyFlowFARTransformer3DModel": _FAR,
    "FAR_Wan_Transformer3DModel": _FAR,  # in its makers' own code, which their files may name
}
"""Classes, and what holds of them where a file does not say it."""


def transformer_in(folder: Path) -> Path | None:
    """The transformer that a folder is or holds; None: the folder is a model that is whole by itself.

    Raises PipelineError (`model_unknown`).
    """
    if (folder / "student.safetensors").is_file():
        return None
    for place in (folder, folder / "transformer"):
        if "_class_name" in _read_object(place / "config.json"):
            return place
    if (folder / "config.json").is_file():
        return None
    what = "is a file" if folder.is_file() else "holds no model"
    raise PipelineError(
        "model_unknown",
        f"{folder} {what}.",
        "Name a model folder, or convert a checkpoint: `stillstream models convert`.",
    )


def read_transformer_shape(folder: Path) -> dict[str, Any]:
    """The shape of a transformer in diffusers' layout. Raises PipelineError (`weights_missing`, `weights_mismatch`)."""
    path = folder / "config.json"
    if not path.is_file():
        raise PipelineError(
            "weights_missing",
            f"There is no {path}.",
            "Name a folder that diffusers wrote, the one called transformer.",
        )
    told = _read_object(path)
    if not told:
        raise not_ours(path, "it is not a JSON object")
    if (kind := str(told.get("_class_name"))) not in _KINDS:
        raise not_ours(path, f"it describes a {kind}, not a {' or an '.join(list(_KINDS)[:2])}")
    for name in ("image_dim", "added_kv_proj_dim"):
        if told.get(name) is not None:
            raise not_ours(path, f"{name} is {told[name]}, and pictures as prompts are not known here")
    known = asdict(StudentConfig())
    shape = _KINDS[kind] | {name: value for name, value in told.items() if name in known}
    shape.setdefault("patch_size", known["patch_size"])
    return {name: tuple(value) if isinstance(value, list) else value for name, value in shape.items()}


def difference_of_shape(folder: Path, shape: StudentConfig) -> str:
    """The first size of a transformer that is not the shape's, in words; empty if there is none.

    Raises PipelineError (`weights_missing`, `weights_mismatch`).
    """
    expected = asdict(shape)
    told = read_transformer_shape(folder).items()
    return next(
        (f"{name} is {value}, the model's is {expected[name]}" for name, value in told if expected[name] != value), ""
    )


def recorded(folder: Path) -> dict[str, Any]:
    """What was written about a transformer's origin and files; empty if nothing was."""
    return _read_object(folder / RECORD)


def not_ours(path: Path, what: str) -> PipelineError:
    return PipelineError(
        "weights_mismatch",
        f"{path} does not fit this model: {what}.",
        "Take the transformer that the configuration belongs to.",
    )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        held = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return held if isinstance(held, dict) else {}
