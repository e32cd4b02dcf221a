"""Two real processes are one: the same losses, the same checkpoint, and either number goes on where the other stopped.

All that two processes do is done in one start of them: a process takes seconds to begin.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.config import ModelConfig
from pipeline.training.settings import LoraSettings, WanSettings
from tests.pipeline.training.ranks import Job, checkpoint, do, do_together
from tests.pipeline.training.test_loop import assert_same

Curves = dict[str, list[float]]
AT_STEP_3 = ("teacher", 3)


def lora(settings: WanSettings) -> WanSettings:
    return replace(settings, lora=LoraSettings(rank=2, alpha=4))


def muon(settings: WanSettings) -> WanSettings:
    return replace(settings, teacher=replace(settings.teacher, muon=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def one(wan_run: WanSettings, folder: Path) -> dict[str, Curves]:
    """What one process does; a run that it began is left for two to end."""
    return {
        "full": do(Job(folder / "one", wan_run)),
        "lora": do(Job(folder / "one_lora", lora(wan_run), stage="teacher")),
        "muon": do(Job(folder / "one_muon", muon(wan_run), stage="teacher")),
        "begun": do(Job(folder / "begun_by_one", wan_run, stop_at=AT_STEP_3)),
    }


@pytest.fixture(scope="module")
def two(wan_run: WanSettings, folder: Path, one: dict[str, Curves]) -> dict[str, Curves]:
    odd = replace(wan_run, teacher=replace(wan_run.teacher, batch=3))
    jobs = {
        "full": Job(folder / "two_full", wan_run),
        "lora": Job(folder / "two_lora", lora(wan_run), stage="teacher"),
        "muon": Job(folder / "two_muon", muon(wan_run), stage="teacher"),
        "muon stopped": Job(folder / "muon_in_parts", muon(wan_run), stop_at=AT_STEP_3),
        "muon resumed": Job(folder / "muon_in_parts", muon(wan_run), stage="teacher"),
        "full stopped": Job(folder / "full_in_parts", wan_run, stop_at=AT_STEP_3),
        "full resumed": Job(folder / "full_in_parts", wan_run, stage="teacher"),
        "taken over": Job(folder / "begun_by_one", wan_run, stage="teacher"),
        "odd": Job(folder / "odd", odd),
    }
    return dict(zip(jobs, do_together(list(jobs.values()), folder / "meeting"), strict=True))


@pytest.mark.parametrize("how", ["full", "lora", "muon"])
def test_two_processes_have_the_losses_of_one(one: dict[str, Curves], two: dict[str, Curves], how: str) -> None:
    assert one[how].keys() == two[how].keys()
    for stage, losses in one[how].items():
        assert len(losses) == 6
        assert len(set(losses)) == 6
        assert two[how][stage] == pytest.approx(losses, abs=1e-4)


@pytest.mark.usefixtures("one", "two")
@pytest.mark.parametrize("run", ["teacher", "student"])
def test_a_checkpoint_of_two_processes_holds_the_whole_tensors_of_one(folder: Path, run: str) -> None:
    ours, theirs = checkpoint(folder / "one" / run), checkpoint(folder / "two_full" / run)
    for part in ("module", "ema"):
        torch.testing.assert_close(theirs[part], ours[part], atol=1e-4, rtol=1e-4)
        assert all(type(value) is torch.Tensor for value in theirs[part].values())
    assert theirs["optimizer"]["state"].keys() == ours["optimizer"]["state"].keys()


@pytest.mark.parametrize("how", ["full", "muon"])
def test_two_processes_that_were_stopped_go_on_bit_by_bit(folder: Path, two: dict[str, Curves], how: str) -> None:
    assert two[f"{how} stopped"]["teacher"] + two[f"{how} resumed"]["teacher"] == two[how]["teacher"]
    assert_same(checkpoint(folder / f"{how}_in_parts" / "teacher"), checkpoint(folder / f"two_{how}" / "teacher"))


def test_muon_steps_elsewhere_than_adamw_and_keeps_whole_momenta(
    folder: Path, one: dict[str, Curves], two: dict[str, Curves], config: ModelConfig
) -> None:
    assert one["muon"]["teacher"][0] == one["full"]["teacher"][0]
    assert abs(one["muon"]["teacher"][-1] - one["full"]["teacher"][-1]) > 1e-3
    shapes = {
        tuple(state["momentum_buffer"].shape)
        for state in checkpoint(folder / "two_muon" / "teacher")["muon"]["state"].values()
    }
    width = config.student.num_attention_heads * config.student.attention_head_dim
    assert shapes == {(width, width), (width, config.student.ffn_dim), (config.student.ffn_dim, width)}


def test_two_processes_go_on_where_one_stopped(one: dict[str, Curves], two: dict[str, Curves]) -> None:
    curve = one["begun"]["teacher"] + two["taken over"]["teacher"]
    assert curve == pytest.approx(one["full"]["teacher"], abs=1e-4)


@pytest.mark.usefixtures("two")
def test_one_of_two_processes_writes(folder: Path) -> None:
    assert len(list((folder / "two_full" / "teacher").glob("events*"))) == 1


def test_a_batch_that_has_no_equal_shares_is_refused(folder: Path, two: dict[str, Curves]) -> None:
    assert two["odd"] == {"batch_uneven": []}
    assert not (folder / "odd").exists()
