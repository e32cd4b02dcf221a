"""Teacher and student: every gradient goes where it should, and a step goes downhill. The losses are the real ones."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from pipeline.config import ModelConfig
from pipeline.sampler import levels, mix
from pipeline.student import Student, TextKV
from pipeline.training import student as student_stage
from pipeline.training import teacher as teacher_stage
from pipeline.training.clips import CHUNKS, Clips
from pipeline.training.forcing import teacher_forced
from pipeline.training.loop import Loss, Trainer
from pipeline.training.settings import StudentSettings, TeacherSettings
from pipeline.training.student import changing, guided_end, moved, rolled_past, walk
from pipeline.training.teacher import (
    Denoiser,
)
from tests.pipeline.conftest import stir

TEACHING = TeacherSettings(budget_s=1, learning_rate=3e-3, warm_up_steps=1, ema=0.5, openings=6, clips=3)
DISTILLING = StudentSettings(
    budget_s=1, learning_rate=3e-3, warm_up_steps=1, ema=0.5, openings=3, clips=3, rolled=0.0, longest=5
)
# A data loader forks; norms under autocast take torch's plain way and say so once.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning"),
    pytest.mark.usefixtures("one_batch"),
]


class OneBatch(Trainer):
    """Takes a few steps on the same batch with the same noise, and keeps the losses. turn: even is openings."""

    last: "OneBatch"
    steps = 6
    turn = 1

    def fit(self, loss: Loss, sample: Callable[[], None] | None = None) -> None:
        OneBatch.last, self.losses = self, []
        for _ in range(self.steps):
            self.losses.append(self._advance(lambda step: loss(self.turn))["loss"])
        self.losses.append(loss(self.turn)[0].item())


@pytest.fixture
def one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a compiler on the path training stays eager: compiling takes longer than all of these tests."""
    monkeypatch.setenv("PATH", "")
    for stage in (teacher_stage, student_stage):
        monkeypatch.setattr(stage, "Trainer", OneBatch)


@pytest.fixture
def data(encoded_openings: Path, encoded: Path, config: ModelConfig) -> tuple[Clips, Clips]:
    return Clips(encoded_openings, config, seed=12), Clips(encoded, config, seed=13)


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


@pytest.mark.parametrize("turn", [0, 1])
def test_the_teacher_goes_downhill_and_every_weight_learns(
    config: ModelConfig, data: tuple[Clips, Clips], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, turn: int
) -> None:
    monkeypatch.setattr(OneBatch, "turn", turn)
    teacher_stage.train_teacher(config, *data, tmp_path, TEACHING)
    trainer = OneBatch.last
    assert trainer.losses[-1] < 0.97 * trainer.losses[0]
    assert isinstance(trainer.module, Denoiser)
    still = [name for name, value in trainer.module.named_parameters() if value.grad is None or not value.grad.any()]
    assert still == []


def test_gradients_reach_the_text_encoder_of_the_teacher(
    config: ModelConfig, data: tuple[Clips, Clips], tmp_path: Path
) -> None:
    torch.manual_seed(2)
    before = weights(Denoiser(config).text)
    made = teacher_stage.train_teacher(config, *data, tmp_path, TEACHING)
    after = weights(made.text)
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_muon_takes_every_matrix_between_layers_and_no_other(config: ModelConfig) -> None:
    denoiser = Denoiser(config)
    hidden = {id(value) for value in denoiser.hidden_matrices()}
    names = {name for name, value in denoiser.named_parameters() if id(value) in hidden}
    assert names == {
        name
        for name, value in denoiser.named_parameters()
        if value.ndim == 2 and (".blocks." in name or name.startswith("text.layers."))
    }
    assert len(names) > 20


@pytest.mark.parametrize("target", ["endpoint", "consistency"])
@pytest.mark.parametrize("turn", [0, 1])
def test_the_student_goes_downhill_while_the_text_encoder_stays_the_teachers(
    config: ModelConfig,
    data: tuple[Clips, Clips],
    knowing: Denoiser,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    turn: int,
    target: Literal["endpoint", "consistency"],
) -> None:
    monkeypatch.setattr(OneBatch, "turn", turn)
    before = weights(knowing)
    made = student_stage.train_student(config, *data, knowing, tmp_path, replace(DISTILLING, target=target))
    trainer = OneBatch.last
    assert trainer.losses[-1] < 0.97 * trainer.losses[0]
    assert isinstance(trainer.module, Denoiser)
    assert all(value.grad is None for value in trainer.module.text.parameters())
    after = weights(made)
    assert all(torch.equal(before[name], value) for name, value in after.items() if name.startswith("text."))
    still = [name for name, value in after.items() if name.startswith("student.") and torch.equal(before[name], value)]
    assert still == []
    assert all(torch.equal(before[name], value) for name, value in weights(knowing).items())


def test_a_student_that_keeps_to_its_start_is_right_from_the_beginning(
    config: ModelConfig, data: tuple[Clips, Clips], knowing: Denoiser, tmp_path: Path
) -> None:
    student_stage.train_student(config, *data, knowing, tmp_path, replace(DISTILLING, target="start"))
    assert OneBatch.last.losses[0] == pytest.approx(1e-3**0.5, rel=1e-2)  # attention with gradients rounds otherwise


def test_anchored_passes_learn_from_true_clips_what_those_before_them_leave_to_them(
    config: ModelConfig,
    data: tuple[Clips, Clips],
    knowing: Denoiser,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = replace(config, sampler=replace(config.sampler, anchored=0.75))
    passes: list[list[tuple[float, bool]]] = []
    real = teacher_forced

    def noted(*given: Any, anchored: bool) -> Tensor:
        passes[-1].append((round(given[3][0, 0].item(), 2), anchored))
        return real(*given, anchored=anchored)

    class Turns(OneBatch):
        """Many turns, once each."""

        def fit(self, loss: Loss, sample: Callable[[], None] | None = None) -> None:
            OneBatch.last, self.losses = self, []
            for turn in range(12):
                passes.append([])
                self.losses.append(self._advance(lambda _, turn=turn: loss(turn))["loss"])  # type: ignore[misc]

    monkeypatch.setattr(student_stage, "teacher_forced", noted)
    monkeypatch.setattr(student_stage, "Trainer", Turns)
    student_stage.train_student(config, *data, knowing, tmp_path, replace(DISTILLING, target="start", anchored=1.0))
    early = [(1.0, False), (0.9, False)]
    rolled = [asked for asked in passes if len(asked) > 1]
    assert all(asked in ([*early, (0.75, True)], [*early, (0.75, True), (0.5, True)]) for asked in rolled)
    alone = [asked[0] for asked in passes if len(asked) == 1]
    assert rolled and alone and all(anchored and 0.2 <= sigma <= 0.75 for sigma, anchored in alone)


def test_the_teacher_points_from_clean_to_noise(config: ModelConfig, data: tuple[Clips, Clips], tmp_path: Path) -> None:
    made = teacher_stage.train_teacher(config, *data, tmp_path, TEACHING)
    clean, prompts, *_ = data[1].batch(1, 3)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    sigmas = torch.full((3, CHUNKS), 0.8)
    text = made.student.text_kv(made.text(made.text.tokenize(prompts)))
    flow = teacher_forced(made.student, clean, mix(clean, noise, 0.8), sigmas, text, config)
    assert (flow * (noise - clean)).mean() > 0


def test_a_walk_goes_from_its_level_to_the_clean_end() -> None:
    for sigma in (1.0, 0.9, 0.5, 0.21):
        levels_walked = walk(sigma, 3.0)
        assert levels_walked[0] == pytest.approx(sigma)
        assert levels_walked[-1] == 0
        assert levels_walked == sorted(levels_walked, reverse=True)
    assert len(walk(1.0, 3.0)) > len(walk(0.5, 3.0)) >= 3


@pytest.mark.parametrize("turn", range(10))
def test_the_student_is_asked_about_what_it_meets_and_led_to_where_the_teacher_ends(
    config: ModelConfig,
    data: tuple[Clips, Clips],
    knowing: Denoiser,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    turn: int,
) -> None:
    """Were teacher and student exact, every point asked about would lie between noise and the same clip."""
    source = data[turn % 2]
    clean = source.batch(turn + 10**6, 3)[0]
    asked: list[tuple[float, Tensor, bool, Tensor]] = []

    def exact(
        student: Student,
        past: Tensor,
        noisy: Tensor,
        sigmas: Tensor,
        text: TextKV,
        config: ModelConfig,
        control: Tensor,
        *,
        anchored: bool,
    ) -> Tensor:
        assert not anchored
        assert control.shape[2] == config.student.control_channels
        assert (sigmas == sigmas[0, 0]).all()
        asked.append((sigmas[0, 0].item(), noisy, torch.is_grad_enabled(), text[0][0]))
        return (noisy - clean) / sigmas[0, 0] + 0 * student.model.proj_out.weight.sum()

    monkeypatch.setattr(student_stage, "teacher_forced", exact)
    monkeypatch.setattr(OneBatch, "turn", turn)
    monkeypatch.setattr(OneBatch, "steps", 1)
    student_stage.train_student(config, *data, knowing, tmp_path, DISTILLING)
    one_step = asked[: len(asked) // 2]
    sigmas = levels(config.sampler)
    place = turn // 2 % (len(sigmas) + 1)
    last = one_step[-1]
    assert [learning for _, _, learning, _ in one_step] == [False] * (len(one_step) - 1) + [True]
    if place < len(sigmas):
        assert [sigma for sigma, *_ in one_step[:place]] == pytest.approx(sigmas[:place])
        assert last[0] == pytest.approx(sigmas[place])
        walked = one_step[place:-1]
    else:
        assert 0.2 <= last[0] <= 1
        walked = one_step[:-1]
    assert torch.equal(walked[0][1], last[1])
    walked_sigmas = [sigma for sigma, *_ in walked]
    assert walked_sigmas[::2] == walked_sigmas[1::2]
    assert walked_sigmas[::2] == pytest.approx(walk(last[0], config.sampler.shift)[:-1])
    for sigma, noisy, _, _ in walked:  # on the straight line from the first point to the clip
        torch.testing.assert_close((noisy - clean) * last[0], (last[1] - clean) * sigma, atol=1e-3, rtol=0)
    assert OneBatch.last.losses[0] == pytest.approx(1e-3**0.5, rel=1e-2)


@pytest.fixture
def gated_knowing(gated: tuple[ModelConfig, Student]) -> Denoiser:
    torch.manual_seed(4)
    made = Denoiser(gated[0])
    stir(made, 0.15)
    return made.eval().requires_grad_(False)


def test_on_its_own_streams_the_student_goes_downhill_towards_the_teacher(
    gated_knowing: Denoiser,
    gated: tuple[ModelConfig, Student],
    data: tuple[Clips, Clips],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The frame before comes from the stream, and the gate learns with everything else."""
    pasts = []
    real = student_stage.rolled_past
    monkeypatch.setattr(student_stage, "rolled_past", lambda *args: pasts.append(real(*args)) or pasts[-1])
    student_stage.train_student(gated[0], *data, gated_knowing, tmp_path, replace(DISTILLING, rolled=1.0))
    trainer = OneBatch.last
    assert trainer.losses[-1] < 0.97 * trainer.losses[0]
    assert len(pasts) == len(trainer.losses)
    bias = trainer.module.get_parameter("student.model.proj_out.bias").grad
    assert bias is not None and bias.unflatten(0, (-1, gated[0].student.out_channels))[:, -1].any()


def test_a_rolled_past_is_the_students_own_stream_and_says_what_it_cannot_tell(config: ModelConfig) -> None:
    torch.manual_seed(2)
    denoiser = Denoiser(config)
    words = denoiser.text(denoiser.text.tokenize(["red ball"] * 2 * CHUNKS))
    lengths, same = set(), torch.ones(2, CHUNKS, dtype=torch.bool)
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            past, known = rolled_past(denoiser, words, torch.ones(2, CHUNKS), 9, config, generator, same)
        assert past.shape == (2, CHUNKS * config.chunk, config.codec.latent_channels, *config.latent_size)
        assert known[:, [0, 2, 3]].all()
        lengths.add(bool(known[0, 1]))
    assert lengths == {True, False}


def test_every_other_stream_goes_over_to_the_next_ones_prompt_after_its_first_chunk() -> None:
    prompts = [name * 1 for name in "aaaabbbbccccdddd"]
    for seed in range(8):
        made = changing(prompts, 4, torch.Generator().manual_seed(seed))
        clips = ["".join(made[at : at + 4]) for at in range(0, 16, 4)]
        assert clips[1::2] == ["bbbb", "dddd"]
        assert clips[0] in ("abbb", "aabb", "aaab")
        assert clips[2] in ("cddd", "ccdd", "cccd")


def test_a_mover_is_what_leaves_the_frame_before_its_chunk(config: ModelConfig) -> None:
    past = torch.randn(1, 4, 4, 4, 6)
    target = past[:, [1, 1, 1, 1]].clone()
    target[:, 3, :, 2, 5] += 0.5
    mask = moved(past, target, config)
    assert mask.sum() == 1
    assert mask[0, 3, 2, 5] == 1


def test_a_consistent_target_is_named_by_the_student_at_the_next_level_of_the_teachers_trajectory() -> None:
    clean, noise = torch.randn(1, 2, 4, 4, 6), torch.randn(1, 2, 4, 4, 6)
    asked: list[tuple[float, Tensor]] = []

    def exact(noisy: Tensor, sigma: float) -> Tensor:
        return clean

    def own(noisy: Tensor, sigma: float) -> Tensor:
        asked.append((sigma, noisy))
        return noisy + 1

    for high, low in ((1.0, 0.9), (0.9, 0.75), (0.75, 0.5)):  # the levels of four steps at shift 3
        end = guided_end(exact, mix(clean, noise, high), high, 3.0, own)
        assert asked[-1][0] == pytest.approx(low)
        torch.testing.assert_close(asked[-1][1], mix(clean, noise, low))
        assert torch.equal(end, asked[-1][1] + 1)


def test_from_the_last_level_the_teacher_walks_to_the_end_alone() -> None:
    clean = torch.randn(1, 2, 4, 4, 6)
    end = guided_end(lambda *_: clean, torch.randn(clean.shape), 0.5, 3.0, pytest.fail)
    torch.testing.assert_close(end, clean)


def assert_average(made: Denoiser) -> None:
    average = OneBatch.last.ema.values
    assert not made.training
    assert not any(value.requires_grad for value in made.parameters())
    assert all(torch.equal(value, average[name]) for name, value in made.state_dict().items())
    learnt = OneBatch.last.module.state_dict()["student.model.proj_out.weight"]
    assert not torch.equal(average["student.model.proj_out.weight"], learnt)


def test_training_returns_the_average_frozen(
    config: ModelConfig, data: tuple[Clips, Clips], knowing: Denoiser, tmp_path: Path
) -> None:
    assert_average(teacher_stage.train_teacher(config, *data, tmp_path / "teacher", TEACHING))
    assert_average(student_stage.train_student(config, *data, knowing, tmp_path / "student", DISTILLING))
