"""Low-rank weights (LoRA) on top of a student: read from any of the usual files, merged in, or put beside its layers.

Beside, their strength can be changed and they can be exchanged between two chunks; nothing of the student is copied or
lost. The keys and values of a prompt hang on them: whoever changes them has those made again.
Source: LoRA (Hu et al. 2021). Knows nothing of training; `pipeline.training.lora` does.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from pipeline.checkpoints import Weights, layer_name, own_name, plain_name, read_checkpoint
from pipeline.config import StudentConfig
from pipeline.errors import PipelineError
from pipeline.fit import blank
from pipeline.student import Student

ENTRIES = ("generator_lora", "lora", "state_dict")

_KINDS = {"lora_A": "down", "lora_down": "down", "lora_B": "up", "lora_up": "up", "alpha": "alpha"}
_KIND = re.compile(rf"^(.+)\.({'|'.join(_KINDS)})(?:\.default)?(?:\.weight)?$")
_FLAT = re.compile(r"^(?:lora_unet|lycoris|lora_transformer)_(.+)$")


@dataclass(frozen=True)
class Pair:
    """What is added to one layer: `up @ down`, times a scale that the file settles."""

    down: Tensor
    up: Tensor
    scale: float

    def added(self, strength: float) -> Tensor:
        return self.up.float() @ self.down.float() * (self.scale * strength)


Adapter = Mapping[str, Pair]
"""By the layer's name in diffusers."""


def read_adapter(path: Path, shape: StudentConfig, *, entry: str | None = None) -> Adapter:
    """Raises PipelineError: those of `read_checkpoint`, `lora_mismatch`."""
    held: Mapping[str, Any] = read_checkpoint(path)
    if not any(isinstance(value, Tensor) for value in held.values()):
        chosen = next((held[name] for name in ([entry] if entry else ENTRIES) if name in held), None)
        if not isinstance(chosen, Mapping):
            raise _mismatch(path, f"it has no entry {' or '.join([entry] if entry else ENTRIES)}")
        held = chosen
    layers = {
        name: (layer.out_features, layer.in_features)
        for name, layer in blank(shape).model.named_modules()
        if isinstance(layer, nn.Linear)
    }
    flat = {style(name).replace(".", "_"): name for name in layers for style in (str, own_name)}
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in held.items():
        found = _KIND.match(key)
        name = found[1] if found else key
        bare = _FLAT.match(name)
        layer = flat.get(bare[1], "") if bare else layer_name(plain_name(name))
        if found is None or layer not in layers:
            raise _mismatch(path, f"{key} belongs to no layer of this model")
        if not isinstance(value, Tensor | float | int):
            raise _mismatch(path, f"{key} is a {type(value).__name__}, not a tensor")
        parts.setdefault(layer, {})[_KINDS[found[2]]] = torch.as_tensor(value)
    if not parts:
        raise _mismatch(path, "it is empty")
    return {layer: _pair(path, layer, part, layers[layer]) for layer, part in parts.items()}


def read_adapters(paths: Sequence[Path], shape: StudentConfig) -> dict[str, Adapter]:
    """Several, by their files' names. Raises PipelineError: those of `read_adapter`, `lora_twice`."""
    adapters: dict[str, Adapter] = {}
    for path in paths:
        if path.stem in adapters:
            raise PipelineError(
                "lora_twice", f"Two files of low-rank weights are called {path.stem}.", "Rename one of them."
            )
        adapters[path.stem] = read_adapter(path, shape)
    return adapters


def _pair(path: Path, layer: str, part: dict[str, Tensor], size: tuple[int, int]) -> Pair:
    if "down" not in part or "up" not in part:
        raise _mismatch(path, f"{layer} has only one of its two halves")
    down, up = part["down"], part["up"]
    if "alpha" in part and part["alpha"].numel() != 1:
        raise _mismatch(path, f"{layer} has an alpha of {part['alpha'].numel()} numbers")
    if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1] or (len(up), down.shape[1]) != size:
        told = f"{'x'.join(map(str, up.shape))} times {'x'.join(map(str, down.shape))}"
        raise _mismatch(path, f"{layer} takes {size[0]}x{size[1]}, the file has {told}")
    rank = down.shape[0]
    return Pair(down, up, float(part["alpha"]) / rank if "alpha" in part else 1.0)


def _mismatch(path: Path, why: str) -> PipelineError:
    return PipelineError(
        "lora_mismatch", f"{path} does not fit this model: {why}.", "Choose low-rank weights made for this base model."
    )


def merged(weights: Weights, adapter: Adapter, strength: float = 1.0) -> Weights:
    """A model's weights with the adapter's added for good; reckoned in single precision."""
    changed = dict(weights)
    for layer, pair in adapter.items():
        weight = weights[f"{layer}.weight"]
        changed[f"{layer}.weight"] = (weight.float() + pair.added(strength)).to(weight.dtype)
    return changed


class Worn:
    """An adapter beside a student's layers, until it is taken off. Several can be worn at once."""

    def __init__(self, student: Student, adapter: Adapter, strength: float = 1.0) -> None:
        weight = next(student.parameters())
        # A tensor, so that compiled passes see each change.
        self._strength = torch.tensor(strength, device=weight.device, dtype=weight.dtype)
        self._hooks: list[RemovableHandle] = []
        for name, pair in adapter.items():
            layer = student.model.get_submodule(name)
            down, up = pair.down.to(weight), (pair.up * pair.scale).to(weight)
            self._hooks.append(layer.register_forward_hook(self._beside(down, up)))

    def _beside(self, down: Tensor, up: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def add(layer: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
            return out + F.linear(F.linear(inputs[0], down), up) * self._strength

        return add

    @property
    def strength(self) -> float:
        return float(self._strength)

    @strength.setter
    def strength(self, value: float) -> None:
        self._strength.fill_(value)

    def take_off(self) -> None:
        """The student is again what it was, bit by bit."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


class Wardrobe:
    """A student's adapters by name, one of which is worn at a time; exchanged between chunks."""

    def __init__(self, student: Student, adapters: Mapping[str, Adapter]) -> None:
        self.student, self.adapters = student, adapters
        self._now = ("", 0.0)
        self._worn: Worn | None = None

    def wear(self, name: str, strength: float) -> tuple[str, float]:
        """Put on the one of this name ("": none), so strongly; returns what tells whether anything changed."""
        before, self._now = self._now, (name, strength) if name else ("", 0.0)
        if name != before[0]:
            if self._worn is not None:
                self._worn.take_off()
            self._worn = Worn(self.student, self.adapters[name], strength) if name else None
        elif self._worn is not None and self._now != before:
            self._worn.strength = strength
        return self._now
