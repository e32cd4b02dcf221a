"""Wan's text encoder, UMT5-XXL: a folder of the hub -> prompts as Wan's transformers were trained on them.

The network is transformers' `UMT5EncoderModel`, the tokens are those of the folder's tokenizer.json. Weights have to
match to the last name. They are held in bfloat16, or in bytes, whatever the file has; a CPU computes in single
precision, one layer at a time. Swapped, they are held in the machine's memory, and each layer is on the device only
while it runs. Knows no streams and keeps nothing of what it read; `pipeline.prompts` does.
"""

import hashlib
import html
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.errors import PipelineError
from pipeline.fit import difference
from pipeline.narrow import Copied, fill

PLACES = 512
"""Tokens of a prompt, in Wan's training; longer ones are cut."""
_TABLE, _TABLE_TOO = "shared.weight", "encoder.embed_tokens.weight"  # one and the same; a file has either or both
_HASHED_BYTES = 1 << 20


class Umt5:
    """Reads prompts. device: what computes."""

    def __init__(self, network: nn.Module, tokenizer: Any, device: str) -> None:
        self.network, self.tokenizer, self.device = network, tokenizer, torch.device(device)

    @torch.inference_mode()
    def read(self, prompt: str) -> Tensor:
        """The embedding of what is written, (tokens, dim), on the CPU; Wan pads it with zeros to PLACES."""
        # Alone and without padding: under its mask, padding changes nothing and only takes time.
        table = self.network.get_submodule("shared")
        held = next(table.parameters()).device
        ids = torch.tensor([self.tokenizer.encode(cleaned(prompt)).ids], device=held)
        words = table(ids).to(self.device)
        if self.device.type == "cpu":
            words = words.float()
        return self.network(inputs_embeds=words).last_hidden_state[0].cpu()


def cleaned(prompt: str) -> str:
    """As Wan's training had its captions: no HTML entities, single spaces."""
    return " ".join(html.unescape(html.unescape(prompt)).split())


def load_umt5(
    folder: Path,
    tokenizer: Path,
    *,
    device: str = "cpu",
    swapped: bool = False,
    bits: int = 16,
    places: int = PLACES,
) -> Umt5:
    """From the folders text_encoder and tokenizer of a Wan repo in diffusers' layout; bits: of the layers' weights, 16
    (bfloat16) or 8. places: tokens at which a prompt is cut. One shard of the files is mapped at a time.

    device: what computes, and holds the weights unless they are swapped: then the machine's memory does.

    Raises PipelineError: `weights_missing`, `weights_damaged`, `text_encoder_mismatch`.
    """
    # Several seconds that no other model should wait for.
    from tokenizers import Tokenizer
    from transformers import UMT5Config, UMT5EncoderModel

    told = _json(folder / "config.json")
    if told.get("model_type") != "umt5":
        raise _mismatch(folder, f"it describes a {told.get('model_type')}, not a umt5")
    file = tokenizer / "tokenizer.json"
    if not file.is_file():
        raise _missing(file)
    try:
        words = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing narrower
        raise PipelineError(
            "weights_damaged", f"{file} cannot be read as a tokenizer.", "Pull the model again."
        ) from error
    words.no_padding()
    words.enable_truncation(places)
    with torch.device("meta"):
        network = UMT5EncoderModel(UMT5Config.from_dict(told)).eval().requires_grad_(False)
    del network.encoder.embed_tokens  # `shared` again; `Umt5` looks words up there
    if differs := difference(dict(_weights(folder)), network.state_dict()):  # mapped, not read
        raise _mismatch(folder, differs)
    computes, holds = torch.device(device), "cpu" if swapped else device
    fill(network, _weights(folder), torch.bfloat16, bits=bits, device=holds)
    if swapped or computes.type == "cpu":
        dtype = torch.float32 if computes.type == "cpu" else None
        for block in network.encoder.block:
            block.layer = nn.ModuleList(Copied(layer, computes, dtype) for layer in block.layer)
        network.encoder.final_layer_norm = Copied(network.encoder.final_layer_norm, computes, dtype)
    return Umt5(network.to(holds), words, device)


def fingerprint(folder: Path, tokenizer: Path, bits: int) -> str:
    """What embeddings hang on: changes with the encoder's or the tokenizer's files.

    Of large files sizes and both ends are looked at, since reading 22.7 GB takes its time.
    """
    hashed = hashlib.sha256(f"{bits} bits, {PLACES} places".encode())
    for path in [*sorted(folder.iterdir()), tokenizer / "tokenizer.json"]:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            hashed.update(f"{path.name} {size}".encode() + file.read(_HASHED_BYTES))
            file.seek(max(0, size - _HASHED_BYTES))
            hashed.update(file.read())
    return hashed.hexdigest()


def _weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    paths = sorted(folder.glob("model*.safetensors"))
    index = folder / "model.safetensors.index.json"
    named = set(_json(index).get("weight_map", {}).values()) if index.is_file() else {path.name for path in paths}
    for name in sorted(named) or ["model.safetensors"]:
        if not (folder / name).is_file():
            raise _missing(folder / name)
        try:
            for key, value in load_file(folder / name).items():
                yield _TABLE if key == _TABLE_TOO else key, value
        except (SafetensorError, OSError) as error:
            raise PipelineError(
                "weights_damaged",
                f"{folder / name} cannot be read: it ends early.",
                "Run `stillstream models pull` again.",
            ) from error


def _json(path: Path) -> dict[str, Any]:
    try:
        told = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise _missing(path) from error
    return told if isinstance(told, dict) else {}


def _missing(path: Path) -> PipelineError:
    return PipelineError(
        "weights_missing", f"There is no {path}, or it cannot be read.", "Run `stillstream models pull` again."
    )


def _mismatch(folder: Path, why: str) -> PipelineError:
    return PipelineError(
        "text_encoder_mismatch",
        f"{folder} does not fit: {why}.",
        "Fetch the text_encoder folder of Wan-AI/Wan2.1-T2V-1.3B-Diffusers.",
    )
