"""Distribution matching: the student is drawn from what the critic sees towards what the teacher sees."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.config import ModelConfig
from pipeline.training import matching
from pipeline.training.clips import Clips
from pipeline.training.loop import Trainer
from pipeline.training.settings import MatchingSettings
from pipeline.training.teacher import Denoiser

SETTINGS = MatchingSettings(
    budget_s=4, learning_rate=1e-3, warm_up_steps=1, ema=0.5, muon=True, streams=2, longest=6, critic_alone=2
)
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning"),
]


@pytest.fixture
def clips(encoded: Path, config: ModelConfig) -> Clips:
    return Clips(encoded, config, seed=13)


def knowing(config: ModelConfig, seed: int) -> Denoiser:
    torch.manual_seed(seed)
    made = Denoiser(config)
    for name, value in made.named_parameters():
        if value.ndim > 1 and "scale_shift" not in name:
            nn.init.normal_(value, std=0.15)
    return made.eval().requires_grad_(False)


def test_descent_moves_what_was_made_from_the_critics_view_to_the_teachers() -> None:
    made = torch.zeros(2, 2, 3, 4, 4, requires_grad=True)
    real, fake = torch.full_like(made, 0.5), torch.full_like(made, -0.5)
    matching.towards_the_teacher(made, real, fake).backward()
    assert made.grad is not None
    assert (made.grad < 0).all()


def test_where_both_see_the_same_nothing_moves() -> None:
    made = torch.randn(2, 2, 3, 4, 4, requires_grad=True)
    same = torch.randn(2, 2, 3, 4, 4)
    matching.towards_the_teacher(made, same, same).backward()
    assert made.grad is not None
    assert made.grad.abs().max() == 0


@pytest.mark.usefixtures("one_second_steps")
def test_the_critic_warms_up_alone_and_then_both_learn(
    config: ModelConfig, clips: Clips, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")  # no compiler: compiling takes longer than this test
    teacher, student = knowing(config, 4), knowing(config, 5)
    start = {name: value.clone() for name, value in student.state_dict().items()}
    seen = []

    class Watched(Trainer):
        def _advance(self, loss):  # type: ignore[no-untyped-def]
            scalars = super()._advance(loss)
            pair = self.module
            seen.append([value.grad is not None for value in (_head(pair.student), _head(pair.critic))])
            return scalars

    monkeypatch.setattr(matching, "Trainer", Watched)
    made = matching.train_matching(config, clips, teacher, student, tmp_path, SETTINGS)
    assert seen == [[False, True], [False, True], [True, True], [True, True]]
    after = made.state_dict()
    assert all(torch.equal(start[name], after[name]) for name in start if name.startswith("text."))
    assert not torch.equal(start["student.model.proj_out.weight"], after["student.model.proj_out.weight"])
    assert torch.equal(teacher.student.model.proj_out.weight, knowing(config, 4).student.model.proj_out.weight)


@pytest.mark.usefixtures("one_second_steps")
def test_rollouts_hold_random_tiles_where_it_is_asked_for(
    config: ModelConfig, clips: Clips, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")  # as above
    masks: list[list[np.ndarray | None]] = []
    roll_out_clip = matching.roll_out_clip

    def watched(*args):  # type: ignore[no-untyped-def]
        masks.append(args[-2])
        return roll_out_clip(*args)

    monkeypatch.setattr(matching, "roll_out_clip", watched)
    both, settings = (knowing(config, 4), knowing(config, 5)), replace(SETTINGS, held=1.0)
    made = matching.train_matching(config, clips, *both, tmp_path, settings)
    assert all(value.isfinite().all() for value in made.state_dict().values())
    assert all(step[0] is None for step in masks)
    held = [mask for step in masks for mask in step[1:] if mask is not None]
    assert held and any(0 < mask.sum() < mask.size for mask in held)


def test_random_masks_repeat_with_their_generator_and_differ_from_chunk_to_chunk() -> None:
    one, other = (matching.random_masks((6, 10), 40, torch.Generator().manual_seed(3)) for _ in range(2))
    assert [mask is None for mask in one] == [mask is None for mask in other]
    assert all(np.array_equal(*pair) for pair in zip(one, other, strict=True) if pair[0] is not None)  # type: ignore[arg-type]
    shares = [mask.mean() for mask in one if mask is not None]
    assert 0 < min(shares) < 0.3 < max(shares)
    assert one[0] is None and 2 < sum(mask is None for mask in one) < 25


def _head(denoiser: Denoiser) -> nn.Parameter:
    weight = denoiser.student.model.proj_out.weight
    assert isinstance(weight, nn.Parameter)
    return weight
