"""A model folder like the real one, small enough to load and run in a test."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.config import CacheConfig, CodecConfig, ModelConfig, StudentConfig, TextConfig

TINY = ModelConfig(
    name="tiny",
    width=64,
    height=32,
    chunk=1,
    student=StudentConfig(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=48,
        num_layers=1,
    ),
    codec=CodecConfig(latent_channels=4, widths=(8, 12, 16)),
    text=TextConfig(length=6, layers=1, heads=2, words=("ball", "blue", "red")),
    cache=CacheConfig(sink=1, window=2),
)


def write_tiny_model(folder: Path, config: ModelConfig = TINY) -> None:
    import torch

    from pipeline.codec import PocketCodec
    from pipeline.student import Student
    from pipeline.text import TextEncoder
    from pipeline.weights import export

    torch.manual_seed(0)
    text = TextEncoder(config.text, config.student.text_dim)
    export(folder, config, PocketCodec(config.codec), text, Student(config.student))


def regions_engine() -> Any:
    """3 x 5 tiles, random weights."""
    import torch

    from pipeline.codec import PocketCodec
    from pipeline.engine import Engine
    from pipeline.student import Student
    from pipeline.text import TextEncoder

    config = replace(TINY, width=160, height=96, chunk=2, cache=CacheConfig(sink=2, window=2))
    torch.manual_seed(0)
    parts = (PocketCodec(config.codec), TextEncoder(config.text, config.student.text_dim), Student(config.student))
    for part in parts:
        part.eval().requires_grad_(False)
    return Engine(config, *parts)
