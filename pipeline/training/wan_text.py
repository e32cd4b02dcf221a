"""Captions as Wan's transformers know them, side by side, padded with zeros. Knows nothing of clips."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.errors import PipelineError
from pipeline.training.encode import Embed
from pipeline.umt5 import PLACES, load_umt5


def load_embed(folder: Path, *, places: int = PLACES, device: str = "cpu") -> Embed:
    """From `text_encoder` and `tokenizer` in a folder. Longer captions are cut at `places` tokens.

    Raises PipelineError: `transformers_missing`, and what `load_umt5` raises.
    """
    try:
        reader = load_umt5(folder / "text_encoder", folder / "tokenizer", device=device)
    except ImportError as error:
        raise PipelineError(
            "transformers_missing",
            "transformers, which reads prompts for Wan, is not installed.",
            "pip install --constraint constraints.txt transformers",
        ) from error

    def embed(prompts: Sequence[str]) -> Tensor:
        read = [reader.read(prompt).float()[:places] for prompt in prompts]
        return torch.stack([F.pad(tokens_LC, (0, 0, 0, places - len(tokens_LC))) for tokens_LC in read])

    return embed
