"""A tiny real model: every size small, every mechanism there."""

import pytest
import torch

from pipeline.config import CacheConfig, CodecConfig, ModelConfig, StudentConfig, TextConfig
from pipeline.student import Student


@pytest.fixture(scope="session")
def config() -> ModelConfig:
    return ModelConfig(
        name="tiny",
        width=96,
        height=64,
        fps=16,
        chunk=2,
        student=StudentConfig(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=32,
            ffn_dim=48,
            num_layers=2,
        ),
        codec=CodecConfig(latent_channels=4, frames=4, widths=(8, 12, 16)),
        text=TextConfig(length=6, layers=1, heads=2, words=("ball", "blue", "red")),
        cache=CacheConfig(sink=2, window=4),
    )


@pytest.fixture(scope="session")
def student(config: ModelConfig) -> Student:
    torch.manual_seed(0)
    made = Student(config.student).eval().requires_grad_(False)
    for name, value in made.named_parameters():
        if "scale_shift" not in name and value.ndim > 1:
            torch.nn.init.normal_(value, std=0.2)
    return made
