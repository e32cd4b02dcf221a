"""Prompts as Wan's transformers know them, for encoding clips: a UMT5 encoder from folders in diffusers' layout.

transformers is loaded when it is asked for. Knows nothing of clips.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from pipeline.errors import PipelineError
from pipeline.training.encode import Embed

PLACES = 512


def load_embed(folder: Path, *, places: int = PLACES, device: str = "cpu") -> Embed:
    """From `text_encoder` and `tokenizer` in a folder. Longer prompts are cut at `places` tokens.

    Raises PipelineError: `transformers_missing`, `weights_missing`, `weights_damaged`.
    """
    try:
        from transformers import AutoTokenizer, UMT5EncoderModel
    except ImportError as error:
        raise PipelineError(
            "transformers_missing",
            "transformers, which reads prompts for Wan, is not installed.",
            "pip install --constraint constraints.txt transformers",
        ) from error
    for path in (folder / "text_encoder" / "config.json", folder / "tokenizer"):
        if not path.exists():
            raise PipelineError(
                "weights_missing", f"{path} is not there.", "Name a Wan folder in diffusers' layout, all of it."
            )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        network = UMT5EncoderModel.from_pretrained(folder / "text_encoder", local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise PipelineError(
            "weights_damaged",
            f"The text encoder in {folder} cannot be read: {str(error).splitlines()[0]}.",
            "Copy the folder again.",
        ) from error
    network = network.to(device).eval().requires_grad_(False)

    @torch.inference_mode()
    def embed(prompts: Sequence[str]) -> Tensor:
        told = tokenizer(
            list(prompts), padding="max_length", max_length=places, truncation=True, return_tensors="pt"
        ).to(device)
        made: Tensor = network(input_ids=told.input_ids, attention_mask=told.attention_mask).last_hidden_state
        return made.float() * told.attention_mask[..., None]

    return embed
