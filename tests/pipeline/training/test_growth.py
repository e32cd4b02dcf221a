"""A grown student draws what the smaller one drew; other sizes are no growth."""

from dataclasses import replace

import torch

from pipeline.attention import Attend, attention
from pipeline.config import ModelConfig
from pipeline.student import Student
from pipeline.training.growth import can_grow, grow


def look(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return attention(q, k, v)


def answer(student: Student, config: ModelConfig, attend: Attend = look) -> torch.Tensor:
    torch.manual_seed(3)
    latents = torch.randn(1, config.chunk, config.codec.latent_channels, *config.latent_size)
    text = student.text_kv(torch.randn(1, config.text.length, config.student.text_dim))
    with torch.no_grad():
        return student(latents, torch.full((1, 1), 700.0), text, attend)


def small_student(config: ModelConfig) -> Student:
    torch.manual_seed(4)
    return Student(config.student)


def test_more_layers_and_wider_ones_draw_what_was_drawn_before(config: ModelConfig) -> None:
    theirs = config
    size = theirs.student
    larger = replace(theirs, student=replace(size, num_layers=size.num_layers + 2, ffn_dim=size.ffn_dim + 24))
    student, grown = small_student(theirs), Student(larger.student)
    assert can_grow(theirs, larger)
    grown.load_state_dict(grow(student.state_dict(), theirs, larger))
    torch.testing.assert_close(answer(grown, larger), answer(student, theirs), atol=1e-5, rtol=0)


def test_what_is_new_can_learn(config: ModelConfig) -> None:
    theirs = config
    size = theirs.student
    larger = replace(theirs, student=replace(size, num_layers=size.num_layers + 1, ffn_dim=size.ffn_dim + 8))
    grown = Student(larger.student)
    grown.load_state_dict(grow(small_student(theirs).state_dict(), theirs, larger))
    torch.manual_seed(3)
    latents = torch.randn(1, config.chunk, config.codec.latent_channels, *config.latent_size)
    text = grown.text_kv(torch.randn(1, config.text.length, config.student.text_dim))
    grown(latents, torch.full((1, 1), 700.0), text, look).square().mean().backward()
    for name in ("attn1.to_out.0", "attn2.to_out.0", "ffn.net.2"):
        part = grown.model.blocks[-1].get_submodule(name)
        assert part.weight.grad is not None and part.weight.grad.abs().max() > 0
    wider = grown.model.blocks[0].get_submodule("ffn.net.2").weight.grad
    assert wider is not None and wider[:, size.ffn_dim :].abs().max() > 0


def test_a_model_does_not_shrink_nor_change_its_heads(config: ModelConfig) -> None:
    model = config
    for other in (
        replace(model.student, num_layers=model.student.num_layers - 1),
        replace(model.student, ffn_dim=model.student.ffn_dim - 8),
        replace(model.student, num_attention_heads=model.student.num_attention_heads + 1),
    ):
        assert not can_grow(model, replace(model, student=other))
