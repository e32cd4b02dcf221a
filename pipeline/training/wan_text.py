"""Prompts for encoding clips: Wan's text encoder, padded as its transformers were trained. Knows nothing of clips."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.training.encode import Embed
from pipeline.umt5 import PLACES, load_umt5


def load_embed(folder: Path, *, places: int = PLACES, device: str = "cpu") -> Embed:
    """From `text_encoder` and `tokenizer` in a folder; longer prompts are cut at `places` tokens.

    Raises PipelineError as `load_umt5` does."""
    reader = load_umt5(folder / "text_encoder", folder / "tokenizer", device=device, places=places)

    def embed(prompts: Sequence[str]) -> Tensor:
        read = [reader.read(prompt).float() for prompt in prompts]
        return torch.stack([F.pad(each, (0, 0, 0, places - len(each))) for each in read])

    return embed
