"""Words in, embeddings out, for whatever a person types."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import ModelConfig
from pipeline.text import FIRST_WORD, PAD, UNKNOWN, TextEncoder, words


def test_case_and_punctuation_do_not_matter(text: TextEncoder) -> None:
    assert words("A RED-ball, (blue)!") == ["a", "red", "ball", "blue"]
    assert torch.equal(text.tokenize(["Red, BALL..."]), text.tokenize(["red ball"]))


@pytest.mark.parametrize("prompt", ["", "   ", "?!… --", "\n\t_"])
def test_a_prompt_without_a_word_is_an_empty_prompt_and_its_embedding_is_finite(text: TextEncoder, prompt: str) -> None:
    tokens = text.tokenize([prompt])
    assert (tokens == PAD).all()
    embedded = text(tokens)
    assert embedded.isfinite().all()
    assert embedded[0, 0].any()
    assert (embedded[0, 1:] == 0).all()


def test_an_empty_prompt_among_others_trains_with_finite_gradients(config: ModelConfig) -> None:
    learning = TextEncoder(config.text, config.student.text_dim).train()
    learning(learning.tokenize(["red ball", ""])).square().sum().backward()
    assert all(value.grad is not None and value.grad.isfinite().all() for value in learning.parameters())


def test_unknown_words_are_listed_in_order_and_share_one_place_in_the_table(text: TextEncoder) -> None:
    assert text.unknown("a Red dragon, blue Ball: Wyvern") == ["a", "dragon", "wyvern"]
    assert text.unknown("red ball") == []
    assert text.tokenize(["red dragon"]).tolist()[0][:3] == [FIRST_WORD + 2, UNKNOWN, PAD]


def test_places_after_the_last_word_are_zero(text: TextEncoder) -> None:
    embedded = text(text.tokenize(["red ball"]))
    assert embedded.shape == (1, 6, 16)
    assert (embedded[0, :2].abs().sum(-1) > 0).all()
    assert (embedded[0, 2:] == 0).all()


def test_longer_prompts_are_cut(text: TextEncoder) -> None:
    six = "red ball blue red ball blue"
    assert torch.equal(text.tokenize([f"{six} red red"]), text.tokenize([six]))


def test_other_words_and_another_order_give_other_embeddings(text: TextEncoder) -> None:
    red, blue, turned = text(text.tokenize(["red ball", "blue ball", "ball red"]))
    assert (red - blue).abs().max() > 1e-3
    assert (red - turned).abs().max() > 1e-3


def test_a_batch_of_prompts_equals_one_at_a_time(text: TextEncoder) -> None:
    prompts = ["red ball", "", "blue", "ball ball ball ball ball ball", "dragon"]
    together = text(text.tokenize(prompts))
    alone = torch.cat([text(text.tokenize([prompt])) for prompt in prompts])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@given(prompt=st.text(max_size=80))
@settings(max_examples=60, deadline=None)
def test_any_text_gives_finite_embeddings(text: TextEncoder, prompt: str) -> None:
    tokens = text.tokenize([prompt])
    assert tokens.shape == (1, 6)
    assert text(tokens).isfinite().all()
    assert len(text.unknown(prompt)) <= len(words(prompt))
