"""Schedules by their published numbers, noise by its key, and a sampler that an exact flow brings home."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pipeline.config import SamplerConfig
from pipeline.sampler import (
    Anchor,
    clean_from,
    clean_from_flow,
    denoise,
    draw_noise,
    guide,
    levels,
    levels_from,
    lowered,
    mix,
    shifted,
    shut,
)

WAN = SamplerConfig(shift=5.0, steps=(1000, 750, 500, 250))
SHAPE = (1, 2, 4, 3, 5)


def test_shift_five_gives_the_levels_of_self_forcing_with_fractional_timesteps() -> None:
    assert levels(WAN) == pytest.approx([1.0, 0.9375, 5 / 6, 0.625])
    assert [1000 * sigma for sigma in levels(WAN)] == pytest.approx([1000.0, 937.5, 833.333333, 625.0])


def test_shift_one_leaves_the_steps_where_they_are() -> None:
    assert levels(SamplerConfig(shift=1.0)) == [1.0, 0.75, 0.5, 0.25]


@given(position=st.floats(0, 1), shift=st.floats(1, 20))
def test_a_shift_only_moves_towards_noise_and_keeps_both_ends(position: float, shift: float) -> None:
    assert position - 1e-12 <= shifted(position, shift) <= 1
    assert shifted(0, shift) == 0
    assert shifted(1, shift) == 1


def test_part_way_starts_run_from_the_strength_down_through_the_lower_levels() -> None:
    assert levels_from(WAN, 0.0) == []
    assert levels_from(WAN, 1.0) == levels(WAN)
    assert levels_from(WAN, 0.9) == pytest.approx([0.9, 5 / 6, 0.625])
    assert levels_from(WAN, 0.9375) == pytest.approx([0.9375, 5 / 6, 0.625])
    assert levels_from(WAN, 0.1) == [0.1]


def test_a_schedule_begun_lower_has_the_same_passes_and_none_above_its_start() -> None:
    assert lowered([0.9, 0.75, 0.5], 0.0) == [0.9, 0.75, 0.5]
    assert lowered([0.9, 0.75, 0.5], 0.1) == pytest.approx([0.8, 0.75, 0.5])
    assert lowered([0.6, 0.55, 0.2], 0.1) == pytest.approx([0.5, 0.5, 0.2])
    assert lowered([0.1], 0.1) == lowered([0.05], 0.1) == lowered([], 0.1) == []


@pytest.mark.parametrize("sigma", [0.0, 0.25, 0.9375, 1.0])
def test_clean_from_flow_undoes_mix(sigma: float) -> None:
    clean, noise = draw_noise(SHAPE, 1, 0, 0), draw_noise(SHAPE, 2, 0, 0)
    noisy = mix(clean, noise, sigma)
    torch.testing.assert_close(clean_from_flow(noisy, noise - clean, sigma), clean, atol=1e-6, rtol=0)


def test_an_open_gate_keeps_the_frame_before_and_a_shut_one_the_answer() -> None:
    answer, last = draw_noise(SHAPE, 1, 0, 0), draw_noise((1, 1, *SHAPE[2:]), 2, 0, 0)
    gate = torch.full_like(answer[:, :, :1], 100.0)
    gate[..., 0] = -100.0
    out = torch.cat([answer, gate], 2)
    made = clean_from("gated", out, answer, 0.5, last)
    assert torch.equal(made[..., 0], answer[..., 0])
    assert torch.equal(made[..., 1:], last.expand(SHAPE)[..., 1:])
    first = clean_from("gated", out, answer, 0.5)
    assert torch.equal(first[:, 0], answer[:, 0]), "a stream's first frame has none before it"
    assert torch.equal(first[:, 1, ..., 1:], answer[:, 0, ..., 1:])


def test_mix_goes_from_clean_to_noise() -> None:
    clean, noise = draw_noise(SHAPE, 1, 0, 0), draw_noise(SHAPE, 2, 0, 0)
    assert torch.equal(mix(clean, noise, 0.0), clean)
    assert torch.equal(mix(clean, noise, 1.0), noise)


def test_noise_is_a_pure_function_of_its_key() -> None:
    first = draw_noise(SHAPE, 7, 3, 1)
    torch.manual_seed(99)
    draw_noise(SHAPE, 8, 0, 0)
    assert torch.equal(draw_noise(SHAPE, 7, 3, 1), first)
    assert first.shape == SHAPE
    assert first.dtype == torch.float32


def test_every_seed_chunk_and_step_has_its_own_noise() -> None:
    keys = [(seed, chunk, step) for seed in (0, 1, 2**31 - 1) for chunk in (0, 1, 2, 10**9) for step in range(4)]
    rows = torch.stack([draw_noise((64,), *key) for key in keys])
    likeness = torch.corrcoef(rows) - torch.eye(len(keys))
    assert likeness.abs().max() < 0.6


def test_noise_is_unit_normal() -> None:
    noise = draw_noise((200_000,), 7, 0, 0)
    assert noise.mean().abs() < 0.01
    assert (noise.std() - 1).abs() < 0.01
    assert ((noise.abs() < 1).float().mean() - 0.6827).abs() < 0.01
    assert (noise[1:] * noise[:-1]).mean().abs() < 0.01


class Oracle:
    """Knows the clean latents, so its flow is exact; keeps what it was asked."""

    def __init__(self, clean: Tensor) -> None:
        self.clean = clean
        self.asked: list[tuple[float, int]] = []

    def __call__(self, noisy: Tensor, sigma: float, step: int) -> Tensor:
        self.asked.append((sigma, step))
        return (noisy - self.clean) / sigma


def noise_of(step: int) -> Tensor:
    return draw_noise(SHAPE, 5, 0, step)


def test_an_exact_flow_leads_to_the_clean_latents_from_pure_noise() -> None:
    oracle = Oracle(draw_noise(SHAPE, 1, 0, 0))
    made = denoise(oracle, noise_of, levels(WAN))
    torch.testing.assert_close(made, oracle.clean, atol=1e-5, rtol=0)
    assert oracle.asked == list(zip(levels(WAN), range(4), strict=True))


def test_each_pass_gets_fresh_noise_on_the_last_guess() -> None:
    guess = draw_noise(SHAPE, 3, 0, 0)
    seen: list[Tensor] = []

    def flow(noisy: Tensor, sigma: float, step: int) -> Tensor:
        seen.append(noisy)
        return (noisy - guess) / sigma

    denoise(flow, noise_of, levels(WAN))
    assert torch.equal(seen[0], noise_of(0))
    for step, sigma in enumerate(levels(WAN)[1:], 1):
        torch.testing.assert_close(seen[step], mix(guess, noise_of(step), sigma), atol=1e-5, rtol=0)


def test_a_source_is_the_start_of_a_part_way_run() -> None:
    source, target = draw_noise(SHAPE, 1, 0, 0), draw_noise(SHAPE, 2, 0, 0)
    seen: list[Tensor] = []

    def flow(noisy: Tensor, sigma: float, step: int) -> Tensor:
        seen.append(noisy)
        return (noisy - target) / sigma

    made = denoise(flow, noise_of, [0.5, 0.25], source)
    assert torch.equal(seen[0], mix(source, noise_of(0), 0.5))
    torch.testing.assert_close(made, target, atol=1e-5, rtol=0)


def test_no_levels_give_the_source_back() -> None:
    source = draw_noise(SHAPE, 1, 0, 0)
    oracle = Oracle(source)
    assert torch.equal(denoise(oracle, noise_of, [], source), source)
    assert oracle.asked == []


@pytest.mark.parametrize("sigmas", [[], [0.5]])
def test_without_a_source_only_pure_noise_can_be_the_start(sigmas: list[float]) -> None:
    with pytest.raises(AssertionError, match="pure noise"):
        denoise(Oracle(noise_of(0)), noise_of, sigmas)


def test_a_student_that_predicts_clean_latents_equals_one_that_predicts_their_flow() -> None:
    target = draw_noise(SHAPE, 2, 0, 0)

    def clean(noisy: Tensor, sigma: float, step: int) -> Tensor:
        return target + 0.1 * noisy

    def flow(noisy: Tensor, sigma: float, step: int) -> Tensor:
        return (noisy - clean(noisy, sigma, step)) / sigma

    made = [denoise(each, noise_of, levels(WAN), None, kind) for each, kind in ((clean, "clean"), (flow, "flow"))]
    torch.testing.assert_close(made[0], made[1], atol=1e-5, rtol=0)


def test_a_gate_is_shut_for_the_first_frame_of_rows_with_new_words_and_for_no_other() -> None:
    out = torch.randn(2, 3, 5, 2, 2)
    made = shut(out, torch.tensor([False, True])[:, None, None])
    assert torch.equal(made[1], out[1])
    assert torch.equal(made[0, 1:], out[0, 1:])
    assert torch.equal(made[0, 0, :-1], out[0, 0, :-1])
    last = torch.randn(2, 1, 4, 2, 2)
    clean = clean_from("gated", made, out, 0.5, last)
    assert torch.equal(clean[0, 0], out[0, 0, :-1])
    assert not torch.equal(clean[1, 0], out[1, 0, :-1])


def test_anchored_passes_keep_the_gate_of_the_last_pass_that_was_not() -> None:
    anchor = Anchor(SamplerConfig(prediction="gated", anchored=0.75), on=True)
    outs = [torch.full((1, 2, 5, 1, 1), float(place)) for place in range(4)]
    kept = [anchor.keep(out, sigma) for out, sigma in zip(outs, (1.0, 0.9, 0.75, 0.5), strict=True)]
    assert [anchor.holds(sigma) for sigma in (1.0, 0.9, 0.75, 0.5)] == [False, False, True, True]
    assert [part[0, 0, :, 0, 0].tolist() for part in kept] == [
        [0, 0, 0, 0, 0],
        [1, 1, 1, 1, 1],
        [2, 2, 2, 2, 1],
        [3, 3, 3, 3, 1],
    ]


def test_nothing_is_anchored_where_it_is_off_and_no_gate_is_made_up() -> None:
    off = Anchor(SamplerConfig(prediction="gated", anchored=0.75), on=False)
    assert not off.holds(0.5)
    plain = Anchor(SamplerConfig(prediction="clean", anchored=0.75), on=True)
    out = torch.randn(1, 2, 4, 1, 1)
    assert plain.keep(out, 0.5) is out


@pytest.mark.parametrize("prediction", ["flow", "clean"])
def test_guidance_goes_beyond_what_the_words_say(prediction: str) -> None:
    told, free = torch.ones(SHAPE), torch.zeros(SHAPE)
    assert (guide(prediction, told, free, 2.5) == 2.5).all()


def test_what_a_gate_lets_through_is_not_led_on() -> None:
    """Else each chunk pushes it further away: told keeps the frame before, free draws a little less of it."""
    last = torch.full((1, 1, 4, 2, 2), 5.0)
    told, free = (
        torch.cat([torch.full((1, 2, 4, 2, 2), value), torch.full((1, 2, 1, 2, 2), gate)], 2)
        for value, gate in ((1.0, 100.0), (0.0, -1.0))
    )
    for _ in range(40):
        made = clean_from("gated", guide("gated", told, free, 2.0), told, 1.0, last)
        last = made[:, -1:]
    assert (last == 5).all()
    told[:, :, -1] = -100.0  # and where nothing is let through, it is led as ever
    assert (clean_from("gated", guide("gated", told, free, 2.0), told, 1.0, last) == 2).all()


def test_a_gate_may_be_shut_for_some_cells() -> None:
    out, same = torch.randn(1, 2, 5, 2, 2), torch.tensor([[[True, False], [True, True]]])
    made = shut(out, same)
    assert (made[0, 0, -1] == -torch.inf).tolist() == (~same[0]).tolist()
    assert torch.equal(made[..., same[0]], out[..., same[0]])
    assert torch.equal(made[:, 1], out[:, 1])
