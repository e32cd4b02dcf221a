"""Shapes of transformers that several families share, and what stands beside them: data, and nothing done with it.

Knows no family, no disk and no torch.
"""

from dataclasses import dataclass, replace

from pipeline.config import StudentConfig
from pipeline.downloads import PARTS, Download


@dataclass(frozen=True)
class TextWeights:
    """Of a text encoder, which is held in two bytes a number, whatever the hub has."""

    tables: int = 0
    """Embeddings, norms and biases."""
    layers: int = 0
    """Of linear layers, which can be kept in a byte each."""
    rows: int = 0
    """Of those layers; each has a scale of its own then."""
    widest: int = 0
    """Of the largest layer, which a CPU copies in single precision while it runs."""


@dataclass(frozen=True)
class CodecWeights:
    """Of an autoencoder, and what it remembers of a stream, in numbers to a pixel of the picture."""

    weights: int
    encoder: float = 0
    decoder: float = 0


@dataclass(frozen=True)
class Base:
    """A transformer's shape, and what stands beside it."""

    title: str
    shape: StudentConfig
    channels: int
    """Of the latents that it draws."""
    stride: int
    """Pixels to a latent cell, along each side."""
    codec: CodecWeights
    """With the weights of a text encoder that is none of `text`."""
    text: TextWeights = TextWeights()
    parts: tuple[Download, ...] = ()
    """Where those are to be had."""


_UMT5_XXL = TextWeights(tables=1_050_398_720, layers=4_630_511_616, rows=983_040, widest=125_833_216)
_WAN_VAE = CodecWeights(126_892_531, encoder=1404, decoder=2364.5)
TINY_DECODER = CodecWeights(9_844_611, decoder=336.25)
TINY_ENCODER = CodecWeights(1_470_928, encoder=376)
"""Both with the rims of all tiles, which they remember while regions are on."""

WAN_SMALL = StudentConfig(
    num_attention_heads=12,
    attention_head_dim=128,
    in_channels=16,
    out_channels=16,
    text_dim=4096,
    ffn_dim=8960,
    num_layers=30,
)
WAN_LARGE = StudentConfig(
    num_attention_heads=40,
    attention_head_dim=128,
    in_channels=16,
    out_channels=16,
    text_dim=4096,
    ffn_dim=13824,
    num_layers=40,
)


def _any_flow(shape: StudentConfig) -> StudentConfig:
    """The same with what AnyFlow-FAR has more."""
    return replace(shape, compressed_patch_size=(1, 4, 4), full_chunk_limit=3, gate_value=0.25, deltatime_type="r")


BASES = {
    "pocket": Base(
        "Pocket",
        StudentConfig(in_channels=60, out_channels=33, position_channels=12, control_channels=16),
        32,
        16,
        CodecWeights(5_087_009),
    ),
    "wan-1.3b": Base("Wan 2.1 1.3B", WAN_SMALL, 16, 8, _WAN_VAE, _UMT5_XXL, PARTS),
    "wan-14b": Base("Wan 2.1 14B", WAN_LARGE, 16, 8, _WAN_VAE, _UMT5_XXL, PARTS),
    "anyflow-1.3b": Base("AnyFlow-FAR's Wan 2.1 1.3B", _any_flow(WAN_SMALL), 16, 8, _WAN_VAE, _UMT5_XXL, PARTS),
    "anyflow-14b": Base("AnyFlow-FAR's Wan 2.1 14B", _any_flow(WAN_LARGE), 16, 8, _WAN_VAE, _UMT5_XXL, PARTS),
}
