"""The loop ends on its budget, goes on where it stood, and never lets go of the last good checkpoint."""

import errno
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from pipeline.errors import PipelineError
from pipeline.training.loop import EMA, Loss, Trainer, save_atomic
from pipeline.training.settings import StageSettings
from pipeline.training.sheet import write_sheet

pytestmark = pytest.mark.usefixtures("one_second_steps")

SETTINGS = StageSettings(budget_s=12, learning_rate=0.05, warm_up_steps=3, ema=0.9, save_s=3)


class KilledError(Exception):
    """Stands for the end of the process."""


def layer(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def task(module: nn.Module, *, stop_at: int | None = None, nan_at: int | None = None) -> Loss:
    """Fit a fixed random map; the batch depends on the step alone."""

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        if step == stop_at:
            raise KilledError
        x = torch.randn(16, 3, generator=torch.Generator().manual_seed(step))
        error = (module(x) - x.cumsum(1)[:, :2]).square().mean()
        return error * (float("nan") if step == nan_at else 1.0), {"error": error.item()}

    return loss


def trained(folder: Path, seed: int = 0, **how: int) -> Trainer:
    module = layer(seed)
    trainer = Trainer("toy", folder, module, SETTINGS)
    trainer.fit(task(module, **how))
    return trainer


def on_disk(folder: Path) -> dict[str, Any]:
    saved: dict[str, Any] = torch.load(folder / "checkpoint.pt", weights_only=True)
    return saved


def assert_same(one: Any, other: Any) -> None:
    """Equal bit for bit, whatever the nesting."""
    assert type(one) is type(other)
    if isinstance(one, Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert_same(value, other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_same(left, right)
    else:
        assert one == other


def test_training_ends_on_its_budget_and_lowers_the_loss(tmp_path: Path) -> None:
    module = layer()
    trainer = Trainer("toy", tmp_path, module, SETTINGS)
    before = task(module)(99)[0].item()
    trainer.fit(task(module))
    assert trainer.done
    assert (trainer.step, trainer.trained_s) == (12, 12.0)
    assert task(module)(99)[0].item() < before
    assert on_disk(tmp_path)["step"] == 12
    assert list(tmp_path.glob("events*"))


def test_a_finished_stage_does_nothing_when_asked_again(tmp_path: Path) -> None:
    trained(tmp_path)
    saved = (tmp_path / "checkpoint.pt").read_bytes()
    again = trained(tmp_path, seed=5, stop_at=12)
    assert again.step == 12
    assert (tmp_path / "checkpoint.pt").read_bytes() == saved


@pytest.mark.parametrize("stop_at", [2, 4, 6, 9])
def test_a_stopped_run_goes_on_as_if_it_had_never_stopped(tmp_path: Path, stop_at: int) -> None:
    trained(tmp_path / "whole")
    with pytest.raises(KilledError):
        trained(tmp_path / "parts", stop_at=stop_at)
    trained(tmp_path / "parts", seed=5 if stop_at >= 4 else 0)  # a checkpoint wins over any start
    assert_same(on_disk(tmp_path / "parts"), on_disk(tmp_path / "whole"))


def test_a_larger_budget_goes_on_from_the_end_of_the_smaller(tmp_path: Path) -> None:
    trained(tmp_path)
    module = layer(5)
    longer = Trainer("toy", tmp_path, module, StageSettings(budget_s=15, warm_up_steps=3))
    assert not longer.done
    longer.fit(task(module))
    assert longer.step == 15


def test_a_loss_that_is_not_a_number_stops_the_stage_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(PipelineError) as stopped:
        trained(tmp_path, nan_at=6)
    assert stopped.value.code == "loss_not_finite"
    assert "step 6" in stopped.value.message
    assert str(tmp_path) in stopped.value.remedy
    saved = on_disk(tmp_path)
    assert saved["step"] == 4
    assert all(value.isfinite().all() for value in saved["module"].values())
    assert trained(tmp_path).step == 12


def test_a_checkpoint_of_another_stage_is_refused_and_left_alone(tmp_path: Path) -> None:
    trained(tmp_path)
    saved = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(PipelineError) as refused:
        Trainer("teacher", tmp_path, layer(), SETTINGS)
    assert refused.value.code == "checkpoint_of_another_stage"
    assert "'toy'" in refused.value.message
    assert (tmp_path / "checkpoint.pt").read_bytes() == saved


def test_a_failed_write_leaves_the_file_before_untouched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint.pt"
    save_atomic({"step": 1}, path)
    assert list(tmp_path.iterdir()) == [path]

    def full_disk(payload: object, to: Path) -> None:
        Path(to).write_bytes(b"half a file")
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(PipelineError) as stopped:
        save_atomic({"step": 2}, path)
    assert stopped.value.code == "disk_full"
    assert on_disk(tmp_path) == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_run_that_is_interrupted_while_it_saves_goes_on_from_the_save_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(tmp_path / "whole")
    save, saves = torch.save, iter((False, True))

    def interrupted(payload: object, to: Path) -> None:
        if next(saves, False):
            Path(to).write_bytes(b"half a file")
            raise KeyboardInterrupt
        save(payload, to)

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "parts")
    assert on_disk(tmp_path / "parts")["step"] == 4
    trained(tmp_path / "parts", seed=5)
    assert_same(on_disk(tmp_path / "parts"), on_disk(tmp_path / "whole"))


def test_a_checkpoint_of_another_model_is_refused_and_left_alone(tmp_path: Path) -> None:
    trained(tmp_path)
    saved = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(PipelineError) as refused:
        Trainer("toy", tmp_path, nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), SETTINGS)
    assert refused.value.code == "checkpoint_of_another_model"
    assert (tmp_path / "checkpoint.pt").read_bytes() == saved


def test_a_stage_ends_on_its_steps_where_they_come_first(tmp_path: Path) -> None:
    module = layer()
    trainer = Trainer("toy", tmp_path, module, replace(SETTINGS, steps=5))
    trainer.fit(task(module))
    assert (trainer.step, trainer.share) == (5, 1.0)


def test_gathered_batches_make_the_step_of_one_large_batch(tmp_path: Path) -> None:
    def whole(module: nn.Module) -> Loss:
        """The batches that three gathered ones would be, in one."""

        def loss(step: int) -> tuple[Tensor, dict[str, float]]:
            x = torch.cat([torch.randn(16, 3, generator=torch.Generator().manual_seed(3 * step + k)) for k in range(3)])
            return (module(x) - x.cumsum(1)[:, :2]).square().mean(), {}

        return loss

    torch.manual_seed(0)
    start = nn.Linear(3, 2).state_dict()
    ends = []
    for name, accumulate in (("gathered", 3), ("whole", 1)):
        module = nn.Linear(3, 2)
        module.load_state_dict(start)
        trainer = Trainer("toy", tmp_path / name, module, replace(SETTINGS, accumulate=accumulate))
        trainer.fit(whole(module) if accumulate == 1 else task(module))
        ends.append(module.weight)
    torch.testing.assert_close(*ends, atol=1e-5, rtol=1e-5)


def test_the_rate_rises_and_then_falls_to_two_percent(tmp_path: Path) -> None:
    trainer = Trainer("toy", tmp_path, layer(), SETTINGS)
    rates = []
    for step in range(13):
        trainer.step, trainer.trained_s = step, float(step)
        rates.append(trainer.rate())
    assert rates[:2] == sorted(rates[:2])
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert max(rates) <= SETTINGS.learning_rate
    assert rates[-1] == pytest.approx(0.02 * SETTINGS.learning_rate)


def test_only_matrices_decay(tmp_path: Path) -> None:
    decayed, plain = Trainer("toy", tmp_path, layer(), SETTINGS).optimizers["optimizer"].param_groups
    assert decayed["weight_decay"] == SETTINGS.weight_decay
    assert plain["weight_decay"] == 0
    assert all(p.ndim > 1 for p in decayed["params"])
    assert all(p.ndim == 1 for p in plain["params"])


class Layered(nn.Sequential):
    def hidden_matrices(self) -> list[nn.Parameter]:
        return [self[0].weight]


@pytest.mark.parametrize("stop_at", [4, 9])
def test_hidden_matrices_go_to_muon_and_its_momentum_is_resumed_too(tmp_path: Path, stop_at: int) -> None:
    settings = replace(SETTINGS, muon=True)

    def run(folder: Path, **how: int) -> Trainer:
        torch.manual_seed(0)
        module = Layered(*layer())
        trainer = Trainer("toy", folder, module, settings)
        trainer.fit(task(module, **how))
        return trainer

    whole = run(tmp_path / "whole")
    assert [id(p) for p in whole.optimizers["muon"].param_groups[0]["params"]] == [id(whole.module[0].weight)]
    taken = [p for group in whole.optimizers["optimizer"].param_groups for p in group["params"]]
    assert len(taken) == len(list(whole.module.parameters())) - 1
    with pytest.raises(KilledError):
        run(tmp_path / "parts", stop_at=stop_at)
    run(tmp_path / "parts")
    assert_same(on_disk(tmp_path / "parts"), on_disk(tmp_path / "whole"))


def test_frozen_parameters_stay_and_the_average_follows_the_rest(tmp_path: Path) -> None:
    module = layer()
    frozen, moving = module[0], module[2]
    frozen.requires_grad_(False)
    start = {name: value.clone() for name, value in module.state_dict().items()}
    trainer = Trainer("toy", tmp_path, module, SETTINGS)
    trainer.fit(task(module))
    assert torch.equal(frozen.weight, start["0.weight"])
    assert torch.equal(trainer.ema.values["0.weight"], start["0.weight"])
    assert not torch.equal(moving.weight, start["2.weight"])
    ahead = (moving.weight - start["2.weight"]).abs().mean()
    behind = (trainer.ema.values["2.weight"] - start["2.weight"]).abs().mean()
    assert 0 < behind < ahead
    assert trainer.ema.values["1.num_batches_tracked"] == 12


def test_an_average_of_a_constant_is_that_constant() -> None:
    module = nn.Linear(2, 2)
    ema = EMA(module, 0.9)
    for step in range(1, 30):
        ema.update(module, step)
    torch.testing.assert_close(ema.values["weight"], module.weight.detach())


def test_samples_are_drawn_at_their_times_and_at_the_end_and_tensorboard_has_them(tmp_path: Path) -> None:
    module = layer()
    drawn: list[int] = []

    def sample() -> Path:
        drawn.append(trainer.step)
        write_sheet(tmp_path / "sheet.png", [[np.zeros((4, 6, 3), np.uint8)]])
        return tmp_path / "sheet.png"

    trainer = Trainer("toy", tmp_path, module, replace(SETTINGS, sample_s=5))
    trainer.fit(task(module), sample)
    assert drawn == [6, 12]
    shown = EventAccumulator(str(tmp_path))
    shown.Reload()
    assert [event.step for event in shown.Images("toy/sample")] == drawn
