"""A tiny real model: every size small, every mechanism there."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import nn

from pipeline.codec import PocketCodec
from pipeline.config import CacheConfig, CodecConfig, ModelConfig, StudentConfig, TextConfig
from pipeline.engine import Engine
from pipeline.structure import CHANNELS
from pipeline.student import Student
from pipeline.text import TextEncoder


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """A pool that spins on contended cores costs more than these sizes do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def config() -> ModelConfig:
    return ModelConfig(
        name="tiny",
        width=96,
        height=64,
        fps=16,
        chunk=2,
        prompt_limit=40,
        student=StudentConfig(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4 + CHANNELS,
            out_channels=4,
            text_dim=16,
            freq_dim=32,
            ffn_dim=48,
            num_layers=2,
            control_channels=CHANNELS,
        ),
        codec=CodecConfig(latent_channels=4, frames=4, widths=(8, 12, 16)),
        text=TextConfig(length=6, layers=1, heads=2, words=("ball", "blue", "red")),
        cache=CacheConfig(sink=2, window=4),
    )


def stir(module: nn.Module, std: float) -> None:
    """Weights that start at zero would hide what the layers do."""
    for name, value in module.named_parameters():
        if "scale_shift" not in name and value.ndim > 1:
            torch.nn.init.normal_(value, std=std)


@pytest.fixture(scope="session")
def student(config: ModelConfig) -> Student:
    torch.manual_seed(0)
    made = Student(config.student).eval().requires_grad_(False)
    stir(made, 0.2)
    return made


@pytest.fixture(scope="session")
def gated(config: ModelConfig, student: Student) -> tuple[ModelConfig, Student]:
    """The same sizes with a gate, half open for some cells and shut for others."""
    shape = replace(config.student, out_channels=config.student.out_channels + 1)
    torch.manual_seed(3)
    made = Student(shape).eval().requires_grad_(False)
    stir(made, 0.2)
    return replace(config, student=shape, sampler=replace(config.sampler, prediction="gated")), made


@pytest.fixture(scope="session")
def codec(config: ModelConfig) -> PocketCodec:
    torch.manual_seed(1)
    made = PocketCodec(config.codec).eval().requires_grad_(False)
    stir(made, 0.1)
    return made


@pytest.fixture(scope="session")
def text(config: ModelConfig) -> TextEncoder:
    torch.manual_seed(2)
    return TextEncoder(config.text, config.student.text_dim).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def engine(config: ModelConfig, codec: PocketCodec, text: TextEncoder, student: Student) -> Engine:
    return Engine(config, codec, text, student)


@pytest.fixture(scope="session")
def gated_engine(gated: tuple[ModelConfig, Student], codec: PocketCodec, text: TextEncoder) -> Engine:
    return Engine(gated[0], codec, text, gated[1])


@pytest.fixture(scope="session")
def anchored_engine(gated: tuple[ModelConfig, Student], codec: PocketCodec, text: TextEncoder) -> Engine:
    """The same weights, whose last two passes see the sink alone."""
    return Engine(replace(gated[0], sampler=replace(gated[0].sampler, anchored=0.75)), codec, text, gated[1])


@pytest.fixture
def open_gate(gated: tuple[ModelConfig, Student], codec: PocketCodec, text: TextEncoder) -> Engine:
    """A model that lets the frame before stay everywhere."""
    config, student = gated[0], Student(gated[0].student)
    student.load_state_dict(gated[1].state_dict())
    with torch.no_grad():
        for part, value in ((student.model.proj_out.weight, 0.0), (student.model.proj_out.bias, 100.0)):
            part.unflatten(0, (-1, config.student.out_channels))[:, -1] = value
    return Engine(config, codec, text, student.eval().requires_grad_(False))
