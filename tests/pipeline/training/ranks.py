"""Two real processes that train together, and what one alone does in their place. Knows nothing of what is asserted."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

from pipeline.errors import PipelineError
from pipeline.training.parallel import ShardedTrainer
from pipeline.training.settings import WanSettings
from pipeline.training.wan import run_wan


class KilledError(Exception):
    """Stands for the end of the process."""


@dataclass(frozen=True)
class Job:
    """One start of `stillstream train`. stop_at: the step at which the process ends, in the stage of that name."""

    out: Path
    settings: WanSettings
    stage: str | None = None
    stop_at: tuple[str, int] | None = None


def do(job: Job) -> dict[str, list[float]]:
    """Run it in this process; returns the loss of each step by stage, or the code of a refusal with no losses."""
    curves: dict[str, list[float]] = {}
    advance = ShardedTrainer._advance

    def watched(self: ShardedTrainer, loss: object) -> dict[str, float]:
        if (self.name, self.step) == job.stop_at:
            raise KilledError
        scalars = advance(self, loss)  # type: ignore[arg-type]
        curves.setdefault(self.name, []).append(scalars["loss"])
        return scalars

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardedTrainer, "_advance", watched)
        try:
            run_wan(job.out, job.settings, stage=job.stage)
        except KilledError:
            pass
        except PipelineError as error:
            return {error.code: []}
    return curves


def do_together(jobs: Sequence[Job], folder: Path, count: int = 2) -> list[dict[str, list[float]]]:
    """The same in `count` processes, job after job."""
    folder.mkdir()
    multiprocessing.spawn(_one_of_them, (count, folder, list(jobs)), nprocs=count)
    said: list[dict[str, list[float]]] = json.loads((folder / "curves.json").read_text())
    return said


def _one_of_them(rank: int, count: int, folder: Path, jobs: list[Job]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=count)
    curves = [do(job) for job in jobs]
    if rank == 0:
        (folder / "curves.json").write_text(json.dumps(curves))
    dist.destroy_process_group()


def checkpoint(folder: Path) -> dict[str, Any]:
    """All that is kept but the time it took."""
    saved: dict[str, Any] = torch.load(folder / "checkpoint.pt", weights_only=True)
    return {name: value for name, value in saved.items() if name != "trained_s"}
