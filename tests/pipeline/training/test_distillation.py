"""Teacher and student: every gradient goes where it should, and a step goes downhill. The losses are the real ones."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pipeline.config import ModelConfig
from pipeline.sampler import mix
from pipeline.student import Student, TextKV
from pipeline.training import student as student_stage
from pipeline.training import teacher as teacher_stage
from pipeline.training.clips import CHUNKS, Clips
from pipeline.training.forcing import teacher_forced
from pipeline.training.loop import Loss, StageSettings, Trainer
from pipeline.training.teacher import Denoiser, drop_captions, noised_past, per_frame

SETTINGS = StageSettings(budget_s=1, learning_rate=3e-3, warm_up_steps=1, ema=0.5)
# A data loader forks; norms under autocast take torch's plain way and say so once.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning"),
    pytest.mark.usefixtures("one_batch"),
]


class OneBatch(Trainer):
    """Takes a few steps on the same batch with the same noise, and keeps the losses."""

    last: "OneBatch"
    steps = 6

    def fit(self, loss: Loss, sample: Callable[[], None] | None = None) -> None:
        OneBatch.last, self.losses = self, []
        for _ in range(self.steps):
            self.losses.append(self._advance(lambda step: loss(0))["loss"])
        self.losses.append(loss(0)[0].item())


@pytest.fixture
def one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a compiler on the path training stays eager: compiling takes longer than all of these tests."""
    monkeypatch.setenv("PATH", "")
    for stage in (teacher_stage, student_stage):
        monkeypatch.setattr(stage, "Trainer", OneBatch)


@pytest.fixture
def clips(encoded: Path) -> Clips:
    return Clips(encoded, seed=12)


@pytest.fixture(scope="module")
def knowing(config: ModelConfig) -> Denoiser:
    """A teacher that says something: fresh ones start at zero."""
    torch.manual_seed(4)
    made = Denoiser(config)
    for name, value in made.named_parameters():
        if value.ndim > 1 and "scale_shift" not in name:
            nn.init.normal_(value, std=0.15)
    return made.eval().requires_grad_(False)


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def test_the_teacher_goes_downhill_and_every_weight_learns(config: ModelConfig, clips: Clips, tmp_path: Path) -> None:
    teacher_stage.train_teacher(config, clips, tmp_path, SETTINGS, batch=3)
    trainer = OneBatch.last
    assert trainer.losses[1] < trainer.losses[0]
    assert trainer.losses[-1] < 0.97 * trainer.losses[0]
    assert isinstance(trainer.module, Denoiser)
    still = [name for name, value in trainer.module.named_parameters() if value.grad is None or not value.grad.any()]
    assert still == []


def test_gradients_reach_the_text_encoder_of_the_teacher(config: ModelConfig, clips: Clips, tmp_path: Path) -> None:
    torch.manual_seed(2)
    before = weights(Denoiser(config).text)
    made = teacher_stage.train_teacher(config, clips, tmp_path, SETTINGS, batch=3)
    after = weights(made.text)
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_the_student_goes_downhill_while_the_text_encoder_stays_the_teachers(
    config: ModelConfig, clips: Clips, knowing: Denoiser, tmp_path: Path
) -> None:
    before = weights(knowing)
    made = student_stage.train_student(config, clips, knowing, tmp_path, SETTINGS, batch=3)
    trainer = OneBatch.last
    assert trainer.losses[1] < trainer.losses[0]
    assert trainer.losses[-1] < 0.97 * trainer.losses[0]
    assert isinstance(trainer.module, Denoiser)
    assert all(value.grad is None for value in trainer.module.text.parameters())
    after = weights(made)
    assert all(torch.equal(before[name], value) for name, value in after.items() if name.startswith("text."))
    still = [name for name, value in after.items() if name.startswith("student.") and torch.equal(before[name], value)]
    assert still == []
    assert all(torch.equal(before[name], value) for name, value in weights(knowing).items())


def test_the_teacher_points_from_clean_to_noise(config: ModelConfig, clips: Clips, tmp_path: Path) -> None:
    made = teacher_stage.train_teacher(config, clips, tmp_path, SETTINGS, batch=3)
    clean, prompts = clips.batch(1, 3)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    sigmas = torch.full((3, CHUNKS), 0.8)
    text = made.student.text_kv(made.text(made.text.tokenize(prompts)))
    flow = teacher_forced(made.student, clean, mix(clean, noise, 0.8), sigmas, text, config)
    assert (flow * (noise - clean)).mean() > 0


def test_the_student_is_led_down_the_path_of_its_teacher(
    config: ModelConfig, clips: Clips, knowing: Denoiser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were teacher and student exact, every point asked about would lie between the same noise and the same clip."""
    clean, _ = clips.batch(10**6, 3)
    asked: list[tuple[Tensor, Tensor]] = []
    learning: list[bool] = []

    def exact(
        student: Student, past: Tensor, noisy: Tensor, sigmas: Tensor, text: TextKV, config: ModelConfig
    ) -> Tensor:
        asked.append((noisy, per_frame(sigmas, config)))
        learning.append(torch.is_grad_enabled())
        flow = (noisy - clean) / per_frame(sigmas, config).clamp_min(1e-6)
        return flow + 0 * student.model.proj_out.weight.sum()

    monkeypatch.setattr(student_stage, "teacher_forced", exact)
    student_stage.train_student(config, clips, knowing, tmp_path, SETTINGS, batch=3)
    told, free, nearer, student = asked[:4]
    assert learning[:4] == [False, False, False, True]
    for same in (free, student):
        assert torch.equal(same[0], told[0])
        assert torch.equal(same[1], told[1])
    assert (nearer[1] < told[1]).all()
    torch.testing.assert_close((nearer[0] - clean) * told[1], (told[0] - clean) * nearer[1], atol=1e-4, rtol=0)
    assert OneBatch.last.losses[0] == pytest.approx(1e-3**0.5, rel=1e-3)


def assert_average(made: Denoiser) -> None:
    average = OneBatch.last.ema.values
    assert not made.training
    assert not any(value.requires_grad for value in made.parameters())
    assert all(torch.equal(value, average[name]) for name, value in made.state_dict().items())
    learnt = OneBatch.last.module.state_dict()["student.model.proj_out.weight"]
    assert not torch.equal(average["student.model.proj_out.weight"], learnt)


def test_training_returns_the_average_frozen(
    config: ModelConfig, clips: Clips, knowing: Denoiser, tmp_path: Path
) -> None:
    assert_average(teacher_stage.train_teacher(config, clips, tmp_path / "teacher", SETTINGS, batch=2))
    assert_average(student_stage.train_student(config, clips, knowing, tmp_path / "student", SETTINGS, batch=2))


def test_half_of_the_pasts_stay_clean_and_the_rest_are_slightly_wrong() -> None:
    clean = torch.randn(200, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    error = (noised_past(clean, torch.Generator().manual_seed(1)) - clean).square().mean((1, 2, 3, 4)).sqrt()
    assert 70 < (error == 0).sum() < 130
    assert error.max() < 0.45
    again = noised_past(clean, torch.Generator().manual_seed(1))
    assert torch.equal(again, noised_past(clean, torch.Generator().manual_seed(1)))


def test_a_clip_loses_all_of_its_captions_or_none() -> None:
    prompts = [f"{clip} {chunk}" for clip in range(300) for chunk in range(CHUNKS)]
    kept = drop_captions(prompts, CHUNKS, torch.Generator().manual_seed(0))
    lost = 0
    for clip in range(300):
        part = slice(clip * CHUNKS, (clip + 1) * CHUNKS)
        assert kept[part] in (prompts[part], [""] * CHUNKS)
        lost += kept[part] == [""] * CHUNKS
    assert 15 < lost < 50


def test_a_value_a_chunk_spreads_over_its_frames(config: ModelConfig) -> None:
    spread = per_frame(torch.tensor([[0.1, 0.9]]), config)
    assert spread.shape == (1, 4, 1, 1, 1)
    assert spread.flatten().tolist() == pytest.approx([0.1, 0.1, 0.9, 0.9])
