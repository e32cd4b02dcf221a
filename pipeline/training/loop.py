"""The loop every training stage shares: budget, schedule, clipping, EMA, progress, checkpoints, exact resume.

Knows nothing of what is trained: a stage hands over its modules and a loss. Progress is measured in seconds of
training, so a stage ends on its budget on any machine, and a resumed run goes on where the checkpoint stood.
"""

import errno
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import cv2
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from pipeline.errors import PipelineError
from pipeline.training.settings import StageSettings

MARGIN_BYTES = 2**20

Loss = Callable[[int], tuple[Tensor, dict[str, float]]]


def can_compile() -> bool:
    """Whether torch.compile finds a C++ compiler; without one training stays eager, at about half the speed."""
    return any(shutil.which(name) for name in ("g++", "clang++"))


def save_atomic(payload: dict[str, Any], path: Path) -> None:
    """Write beside, then rename: a full disk or a kill leaves the file before untouched.

    Raises PipelineError `disk_full`.
    """
    beside = path.with_suffix(".tmp")
    try:
        torch.save(payload, beside)
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:  # torch's zip writer turns a failed write into a RuntimeError
        beside.unlink(missing_ok=True)
        if is_full(error, path.parent):
            raise disk_full(f"{path} is as it was at the save before", "training") from error
        raise


def is_full(error: Exception, folder: Path) -> bool:
    """Whether a write failed for want of room. Some libraries hide the number of the error."""
    return getattr(error, "errno", None) == errno.ENOSPC or shutil.disk_usage(folder).free < MARGIN_BYTES


def disk_full(left: str, what: str) -> PipelineError:
    return PipelineError(
        "disk_full", f"The disk is full; {left}.", f"Make room and start again: {what} goes on from there."
    )


class EMA:
    """Running average of the trainable parameters; buffers are copied."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: value.detach().clone() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, value in module.state_dict().items():
            if value.dtype.is_floating_point:
                self.values[name].lerp_(value, 1 - decay)
            else:
                self.values[name].copy_(value)


class Trainer:
    """One stage in one folder: `checkpoint.pt` (all of the state), `events*` (TensorBoard)."""

    def __init__(self, name: str, folder: Path, module: nn.Module, settings: StageSettings) -> None:
        self.name, self.folder, self.module, self.settings = name, folder, module, settings
        folder.mkdir(parents=True, exist_ok=True)
        hidden = self._matrices() if settings.muon else []
        taken = {id(matrix) for matrix in hidden}
        others = [p for p in module.parameters() if p.requires_grad and id(p) not in taken]
        groups = [
            {"params": [p for p in others if p.ndim > 1], "weight_decay": settings.weight_decay},
            {"params": [p for p in others if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            "optimizer": torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.99))
        }
        if hidden:
            self.optimizers["muon"] = self._muon(hidden)
        self.ema = EMA(module, settings.ema)
        self.step, self.trained_s = 0, 0.0
        self._resume()

    def _resume(self) -> None:
        path = self.folder / "checkpoint.pt"
        if not path.is_file():
            return
        saved = torch.load(path, weights_only=True, map_location=self.reads_onto)
        if saved["name"] != self.name:
            raise PipelineError(
                "checkpoint_of_another_stage",
                f"{path} belongs to stage {saved['name']!r}, not {self.name!r}.",
                "Give each stage its own folder.",
            )
        try:
            self.module.load_state_dict(self._own(saved["module"], self.module.state_dict()))
        except RuntimeError as error:
            raise PipelineError(
                "checkpoint_of_another_model",
                f"{path} does not fit this model: {str(error).splitlines()[-1].strip().rstrip('.')}.",
                "Train the other model in another folder, or take the configuration that this one began with.",
            ) from error
        self.ema.values = self._own(saved["ema"], self.ema.values)
        for key, optimizer in self.optimizers.items():
            matrices = [p for group in optimizer.param_groups for p in group["params"]]
            kept = {
                at: self._own(state, dict.fromkeys(state, matrices[at])) for at, state in saved[key]["state"].items()
            }
            optimizer.load_state_dict({**saved[key], "state": kept})
        self.step, self.trained_s = saved["step"], saved["trained_s"]

    def begin_with(self, weights: dict[str, Tensor]) -> None:
        """Other weights than the module came with, for the average too. Names that are not given stay."""
        self.module.load_state_dict(weights, strict=False)
        self.ema = EMA(self.module, self.settings.ema)

    def save(self) -> None:
        self.write(self.state())

    def write(self, state: dict[str, Any]) -> None:
        save_atomic(state, self.folder / "checkpoint.pt")

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs."""
        return {
            "name": self.name,
            "module": self.module.state_dict(),
            "ema": self.ema.values,
            **{key: optimizer.state_dict() for key, optimizer in self.optimizers.items()},
            "step": self.step,
            "trained_s": self.trained_s,
        }

    # Where several processes train together (`parallel.py`), these say what one of them holds and what all agree on.

    @property
    def writes(self) -> bool:
        """Whether this process shows progress and writes files."""
        return True

    @property
    def reads_onto(self) -> torch.device:
        """Where a checkpoint is read to."""
        return next(self.module.parameters()).device

    def _matrices(self) -> list[nn.Parameter]:
        """The weights between layers."""
        return list(self.module.hidden_matrices())  # type: ignore[operator]

    def _muon(self, matrices: list[nn.Parameter]) -> torch.optim.Optimizer:
        rate, decay = self.settings.learning_rate, self.settings.weight_decay
        return torch.optim.Muon(matrices, rate, decay, adjust_lr_fn="match_rms_adamw")

    def _own(self, saved: dict[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This process's share of saved tensors, cut as `like` is."""
        return saved

    def _agreed(self, values: list[float]) -> list[float]:
        """Their means over all processes."""
        return values

    def _clip(self) -> float:
        """Limit the gradient; returns its norm before."""
        return torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.settings.clip).item()

    @property
    def share(self) -> float:
        """How much of the stage is done, by time or by steps, whichever is further; 1 is all."""
        by_steps = self.step / self.settings.steps if self.settings.steps else 0.0
        return min(1.0, max(self.trained_s / self.settings.budget_s, by_steps))

    @property
    def done(self) -> bool:
        return self.share >= 1

    def rate(self) -> float:
        """Linear warm-up, then a cosine over the stage down to 2 % of the peak."""
        share = self.share
        rise = min(1.0, (self.step + 1) / self.settings.warm_up_steps)
        return self.settings.learning_rate * rise * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))

    def fit(self, loss: Loss, sample: Callable[[], Path] | None = None) -> None:
        """Train until the budget is spent. Raises PipelineError `loss_not_finite`; the last good checkpoint stays.

        sample: draws a sheet of what the average makes now and returns its path; TensorBoard shows it too.
        """
        from torch.utils.tensorboard.writer import SummaryWriter

        columns = (
            TextColumn(f"{self.name:<12}"),
            BarColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
        )
        saved_s = sampled_s = self.trained_s
        with ExitStack() as open_until_the_end:
            progress = open_until_the_end.enter_context(Progress(*columns, disable=not self.writes))
            writer = None
            if self.writes:
                writer = open_until_the_end.enter_context(SummaryWriter(str(self.folder), purge_step=self.step))
            task = progress.add_task("", total=1.0, note="")
            progress.update(task, completed=self.share)
            newest: dict[str, float] = {}
            while not self.done:
                started = time.perf_counter()
                scalars = self._advance(loss)
                self.trained_s += self._agreed([time.perf_counter() - started])[0]
                newest |= scalars  # a stage may have other things to tell at each step
                if writer is not None and self.step % 10 == 0:
                    for key, value in newest.items():
                        writer.add_scalar(f"{self.name}/{key}", value, self.step)
                note = f"step {self.step} " + " ".join(f"{key} {value:.4f}" for key, value in scalars.items())
                progress.update(task, completed=self.share, note=note)
                if self.writes and self.step % 100 == 0:
                    progress.console.print(f"{self.name} {self.trained_s:.0f} s {note}", highlight=False)
                if self.trained_s - saved_s > self.settings.save_s or self.done:
                    self.save()
                    saved_s = self.trained_s
                if sample is not None and (self.trained_s - sampled_s > self.settings.sample_s or self.done):
                    sheet = cv2.cvtColor(cv2.imread(str(sample())), cv2.COLOR_BGR2RGB)
                    if writer is not None:
                        writer.add_image(f"{self.name}/sample", sheet, self.step, dataformats="HWC")
                    sampled_s = self.trained_s

    def _advance(self, loss: Loss) -> dict[str, float]:
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = self.rate()
            optimizer.zero_grad(set_to_none=True)
        value, scalars = self._gathered(loss)
        value, *rest = self._agreed([value, *scalars.values()])
        scalars, norm = dict(zip(scalars, rest, strict=True)), self._clip()
        if not math.isfinite(value) or not math.isfinite(norm):
            raise PipelineError(
                "loss_not_finite",
                f"At step {self.step} the loss of {self.name} is {value} and its gradient {norm}.",
                f"The state before it is in {self.folder}; lower the learning rate and start again.",
            )
        for optimizer in self.optimizers.values():
            optimizer.step()
        self.step += 1
        self.ema.update(self.module, self.step)
        return {"loss": value, **scalars, "grad": norm}

    def _gathered(self, loss: Loss) -> tuple[float, dict[str, float]]:
        """Gradients of `accumulate` batches, as of one large batch. Batch numbers go on from step to step."""
        count, total = self.settings.accumulate, 0.0
        scalars: dict[str, float] = {}
        for part in range(count):
            value, scalars = loss(self.step * count + part)
            (value / count).backward()
            total += value.item() / count
        return total, scalars
