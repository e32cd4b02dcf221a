"""What a teacher is taught with: levels of noise, pasts as a stream remembers them, and what is to stay."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import ModelConfig
from pipeline.student import Student
from pipeline.training import teacher as teacher_stage
from pipeline.training.clips import CHUNKS, Clips
from pipeline.training.forcing import said
from pipeline.training.teacher import (
    DRAWN_MOST,
    GATE_START,
    Denoiser,
    drop_captions,
    drop_structure,
    held,
    imperfect_past,
    noise_levels,
    noised_past,
    unchanged,
)


@pytest.fixture
def clips(encoded: Path, config: ModelConfig) -> Clips:
    return Clips(encoded, config, seed=13)


def test_levels_are_often_pure_noise_and_otherwise_spread(config: ModelConfig) -> None:
    drawn = noise_levels(2000, 2, config.sampler.shift, torch.Generator().manual_seed(0))
    assert drawn.shape == (2000, 2)
    assert 0.1 < (drawn == 1).float().mean() < 0.2
    assert ((drawn > 0) & (drawn <= 1)).all()
    assert (drawn < 0.5).float().mean() > 0.1


def test_half_of_the_pasts_stay_clean_and_the_rest_are_slightly_wrong() -> None:
    clean = torch.randn(200, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    error = (noised_past(clean, torch.Generator().manual_seed(1)) - clean).square().mean((1, 2, 3, 4)).sqrt()
    assert 70 < (error == 0).sum() < 130
    assert error.max() < 0.45
    again = noised_past(clean, torch.Generator().manual_seed(1))
    assert torch.equal(again, noised_past(clean, torch.Generator().manual_seed(1)))


def test_every_other_past_is_drawn_by_the_model_and_an_opening_has_none(
    config: ModelConfig, clips: Clips, knowing: Denoiser
) -> None:
    clean, prompts, _, control, _ = clips.batch(0, 5)
    same = unchanged(prompts, CHUNKS)
    text = knowing.student.text_kv(knowing.text(knowing.text.tokenize(prompts)))
    past = imperfect_past(knowing, clean, text, control, config, torch.Generator().manual_seed(3), same)
    noised = noised_past(clean, torch.Generator().manual_seed(3))
    assert torch.equal(past[1::2], noised[1::2])
    assert ((past - clean)[::2].square().mean((1, 2, 3, 4)) > 0.01).all()
    alone = (clean[:, : config.chunk], text, control[:, : config.chunk])
    opening = imperfect_past(knowing, *alone, config, torch.Generator().manual_seed(3), same[:, :1])
    assert torch.equal(opening, noised_past(clean[:, : config.chunk], torch.Generator().manual_seed(3)))


def test_structure_is_dropped_half_of_the_time_and_only_where_the_noise_lets_outlines_through(
    config: ModelConfig,
) -> None:
    sigmas = torch.tensor([[0.7], [0.8], [1.0]]).repeat(100, 1)
    control = torch.ones(300, config.chunk, 16, 2, 2)
    kept = drop_structure(control, sigmas, config, torch.Generator().manual_seed(0)).mean((1, 2, 3, 4)).view(100, 3)
    assert set(kept[:, 0].tolist()) == {0.0, 1.0}
    assert 30 < kept[:, 0].sum() < 70
    assert (kept[:, 1:] == 1).all()


def test_a_model_that_is_told_no_structure_begins_as_one_that_knows_none(config: ModelConfig) -> None:
    torch.manual_seed(0)
    denoiser = Denoiser(config).student
    latents = torch.randn(1, config.chunk, config.codec.latent_channels, *config.latent_size)
    control = torch.rand(1, config.chunk, 16, *config.latent_size)
    assert torch.equal(denoiser.embed(latents, control), denoiser.embed(latents))
    with torch.no_grad():
        denoiser.model.patch_embedding.weight.add_(0.1)
    assert not torch.equal(denoiser.embed(latents, control), denoiser.embed(latents))
    assert torch.equal(denoiser.embed(latents, 0 * control), denoiser.embed(latents))


def test_a_clip_loses_all_of_its_captions_or_none() -> None:
    prompts = [f"{clip} {chunk}" for clip in range(300) for chunk in range(CHUNKS)]
    kept = drop_captions(prompts, CHUNKS, torch.Generator().manual_seed(0))
    lost = 0
    for clip in range(300):
        part = slice(clip * CHUNKS, (clip + 1) * CHUNKS)
        assert kept[part] in (prompts[part], [""] * CHUNKS)
        lost += kept[part] == [""] * CHUNKS
    assert 15 < lost < 50


def test_a_gate_begins_nearly_shut(gated: tuple[ModelConfig, Student]) -> None:
    config, _ = gated
    clean = torch.randn(2, 4, 4, 4, 6)
    text = [(torch.zeros(4, 1, 2, 12),) * 2] * config.student.num_layers
    made = said(Denoiser(config).student, clean, clean, torch.full((2, 2), 0.5), text, config)
    share = torch.tensor(GATE_START).sigmoid()
    alone = made[:, :1]
    torch.testing.assert_close(made[:, 1:2], alone)  # all answers are alike, and a stream's first has none before it
    torch.testing.assert_close(made[:, 2:3], torch.lerp(alone, clean[:, 1:2], share))
    torch.testing.assert_close(made[:, 3:], torch.lerp(alone, made[:, 2:3], share))


def test_what_stands_still_stays_as_the_past_has_it_unless_that_is_far_off(config: ModelConfig) -> None:
    clean = torch.randn(1, 1, 4, 4, 6).expand(1, 6, 4, 4, 6).clone()
    clean[:, 4:, :, 0, 0] += 1.0  # moves in the last chunk
    past = clean + 0.1
    past[:, :, :, 3, 5] += 1.0  # a ghost
    target, stays = held(clean, past, config, torch.ones(1, 3, dtype=torch.bool))
    assert torch.equal(target[:, :2], clean[:, :2])
    assert torch.equal(target[..., 3, 5], clean[..., 3, 5])
    assert torch.equal(target[:, 4:, :, 0, 0], clean[:, 4:, :, 0, 0])
    assert not stays[:, 0].any()
    assert not stays[:, [2, 4], :, 3, 5].any(), "the past shows a ghost there"
    assert not stays[:, 4, :, 0, 0].any()
    assert stays[:, 5, :, 0, 0].all(), "it stands again, from one frame of the chunk to the next"
    assert stays.sum() == 5 * 24 - 2 - 1
    torch.testing.assert_close(target[:, 2:, :, 1:3], past[:, [1, 1, 3, 3]][:, :, :, 1:3])


def test_new_words_let_nothing_stay_at_the_border_they_come_at(config: ModelConfig) -> None:
    clean = torch.randn(1, 1, 4, 4, 6).expand(2, 6, 4, 4, 6)
    same_BK = torch.tensor([[True, True, False], [True, True, True]])
    target, stays = held(clean, clean + 0.1, config, same_BK)
    assert not stays[0, 4].any()
    assert stays[0, [1, 2, 3, 5]].all()
    assert stays[1, 1:].all()
    assert torch.equal(target[0, 4], clean[0, 4])


def test_words_are_new_where_they_are_others_than_the_chunk_before_had() -> None:
    same_BK = unchanged(["a", "a", "b", "b", "c", "d", "d", "d"], 4)
    assert same_BK.tolist() == [[False, True, False, True], [False, False, True, True]]
    assert unchanged([""] * 8, 4)[:, 1:].all(), "a clip that lost its captions has the same ones all along"


def test_a_past_may_be_drawn_from_a_past_that_was_drawn(
    config: ModelConfig, clips: Clips, knowing: Denoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As often as a stream that is a few chunks old has it, each time from what was drawn last."""
    clean, prompts, _, control, _ = clips.batch(0, 2)
    text = knowing.student.text_kv(knowing.text(knowing.text.tokenize(prompts)))
    pasts: list[torch.Tensor] = []
    made: list[torch.Tensor] = []

    def watched(student: Student, past: torch.Tensor, *rest: Any) -> torch.Tensor:
        pasts.append(past)
        made.append(said(student, past, *rest))
        return made[-1]

    monkeypatch.setattr(teacher_stage, "said", watched)
    rounds = []
    for seed in range(12):
        pasts.clear()
        made.clear()
        generator = torch.Generator().manual_seed(seed)
        past = imperfect_past(knowing, clean, text, control, config, generator, unchanged(prompts, CHUNKS))
        assert torch.equal(past[::2], made[-1])
        assert torch.equal(pasts[0], clean[::2])
        assert all(torch.equal(seen, drawn) for seen, drawn in zip(pasts[1:], made, strict=False))
        rounds.append(len(made))
    assert set(rounds) == set(range(1, DRAWN_MOST + 1))


def test_every_other_of_the_drawn_pasts_is_drawn_under_another_clips_words(
    config: ModelConfig, clips: Clips, knowing: Denoiser
) -> None:
    clean, prompts, _, control, _ = clips.batch(0, 8)
    prompts = [text for row in range(8) for text in [f"{'red' if row % 4 else 'blue'} ball"] * CHUNKS]

    def pasts(prompts: list[str]) -> torch.Tensor:
        text = knowing.student.text_kv(knowing.text(knowing.text.tokenize(prompts)))
        generator = torch.Generator().manual_seed(3)
        return imperfect_past(knowing, clean, text, control, config, generator, unchanged(prompts, CHUNKS))

    first = prompts[: 4 * CHUNKS] + prompts[CHUNKS : 2 * CHUNKS] + prompts[5 * CHUNKS :]  # other words in clip 4
    changed = (pasts(first) - pasts(prompts)).abs().amax((1, 2, 3, 4)) > 1e-5
    assert changed.tolist() == [row in (2, 4) for row in range(8)]
