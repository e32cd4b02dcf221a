"""The pocket text encoder: words of a small vocabulary to embeddings. Knows nothing of what the words look like."""

import re
from typing import Protocol, Self

import torch
from torch import Tensor, nn

from pipeline.config import TextConfig

PAD, UNKNOWN, FIRST_WORD = 0, 1, 2
_WORD = re.compile(r"[^\W_]+")


def words(prompt: str) -> list[str]:
    return [match.group() for match in _WORD.finditer(prompt.lower())]


class Text(Protocol):
    """What the engine asks of a text encoder. Embeddings are (1, length, dim)."""

    def place(self, device: torch.device) -> Self: ...
    def unknown(self, prompt: str) -> list[str]:
        """Words that it does not know."""

    def embed(self, prompt: str) -> Tensor: ...
    def ask(self, prompt: str) -> Tensor | None:
        """The same without waiting: None while the prompt is being read."""


class TextEncoder(nn.Module):
    """Text to (B, length, dim); places after the last word are zero, as Wan pads its prompts."""

    def __init__(self, config: TextConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        self.ids = {word: FIRST_WORD + index for index, word in enumerate(config.words)}
        self.table = nn.Embedding(FIRST_WORD + len(config.words), dim)
        self.places = nn.Parameter(torch.randn(config.length, dim) * 0.02)
        layer = nn.TransformerEncoderLayer(dim, config.heads, 4 * dim, 0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, config.layers, nn.LayerNorm(dim), enable_nested_tensor=False)

    def place(self, device: torch.device) -> Self:
        return self.to(device)

    def embed(self, prompt: str) -> Tensor:
        return self(self.tokenize([prompt]).to(self.places.device))

    def ask(self, prompt: str) -> Tensor | None:
        """It is read in no time."""
        return self.embed(prompt)

    def unknown(self, prompt: str) -> list[str]:
        """Words of the prompt that the vocabulary lacks, in order."""
        return [word for word in words(prompt) if word not in self.ids]

    def tokenize(self, prompts: list[str]) -> Tensor:
        """(B, length) int64. Longer prompts are cut at `length` words."""
        rows = torch.full((len(prompts), self.config.length), PAD)
        for row, prompt in zip(rows, prompts, strict=True):
            ids = [self.ids.get(word, UNKNOWN) for word in words(prompt)[: self.config.length]]
            row[: len(ids)] = torch.tensor(ids, dtype=torch.int64)
        return rows

    def forward(self, tokens_BL: Tensor) -> Tensor:
        hidden = self.table(tokens_BL) + self.places
        padding = tokens_BL == PAD
        # An empty prompt has no word to look at; its first place stays open so that attention has something.
        padding = padding & ~((torch.arange(padding.shape[1], device=padding.device) == 0)[None])
        return self.layers(hidden, src_key_padding_mask=padding).masked_fill(padding[..., None], 0.0)
