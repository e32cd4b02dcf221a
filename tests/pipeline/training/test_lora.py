"""Low-rank adaptation: begins as the model was, moves the thin layers alone, and merges into plain weights."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from pipeline.attention import CachedAttention
from pipeline.config import ModelConfig
from pipeline.kv_cache import KVCache
from pipeline.student import Student
from pipeline.training.lora import Adapted, Adapters, adapt, merge
from pipeline.training.settings import LoraSettings


def passed(student: Student, config: ModelConfig) -> torch.Tensor:
    draw = torch.Generator().manual_seed(1)
    shape = config.student
    cache = KVCache(
        config.cache, shape.num_layers, config.tokens_per_frame, shape.num_attention_heads, shape.attention_head_dim
    )
    latents = torch.randn(1, 2, 4, *config.latent_size, generator=draw)
    text = student.text_kv(torch.randn(1, 3, shape.text_dim, generator=draw))
    return student(latents, torch.full((1, 1), 500.0), text, CachedAttention(cache, student, config.grid, 2))


@pytest.fixture
def adapted(student: Student) -> Student:
    made = deepcopy(student)
    adapt(made, LoraSettings(rank=3, alpha=6))
    return made


def test_an_adapted_model_begins_as_what_it_was(student: Student, adapted: Student, config: ModelConfig) -> None:
    assert torch.equal(passed(adapted, config), passed(student, config))


def test_every_linear_layer_of_the_blocks_has_thin_ones_and_nothing_else_learns(
    student: Student, adapted: Student
) -> None:
    linear = [name for name, layer in student.model.blocks.named_modules() if isinstance(layer, nn.Linear)]
    found = [name for name, layer in adapted.model.blocks.named_modules() if isinstance(layer, Adapted)]
    assert found == linear
    learning = {name for name, value in adapted.named_parameters() if value.requires_grad}
    assert {name.split(".")[-2] for name in learning} == {"down", "up"}
    assert len(learning) == 2 * len(linear) == len(Adapters(adapted).state_dict())


def test_training_the_adapters_changes_the_model_and_leaves_its_weights(
    student: Student, adapted: Student, config: ModelConfig
) -> None:
    optimizer = torch.optim.AdamW(Adapters(adapted).parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        passed(adapted, config).square().mean().backward()
        optimizer.step()
    assert not torch.equal(passed(adapted, config), passed(student, config))
    now = adapted.state_dict()
    assert all(torch.equal(now[name], value) for name, value in student.state_dict().items())


def test_merged_weights_make_the_same_pass_under_the_names_of_the_first(
    student: Student, adapted: Student, config: ModelConfig
) -> None:
    for value in Adapters(adapted).parameters():
        nn.init.normal_(value, std=0.1, generator=torch.Generator().manual_seed(2))
    before = passed(adapted, config)
    merge(adapted)
    assert adapted.state_dict().keys() == student.state_dict().keys()
    assert not any(isinstance(layer, Adapted) for layer in adapted.modules())
    torch.testing.assert_close(passed(adapted, config), before, atol=1e-4, rtol=1e-4)
    assert (before - passed(student, config)).abs().max() > 0.01
