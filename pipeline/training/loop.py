"""The loop every training stage shares: budget, schedule, clipping, EMA, progress, checkpoints, exact resume.

Knows nothing of what is trained: a stage hands over its modules and a loss. Progress is measured in seconds of
training, so a stage ends on its budget on any machine, and a resumed run goes on where the checkpoint stood.
"""

import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from pipeline.errors import PipelineError

Loss = Callable[[int], tuple[Tensor, dict[str, float]]]


@dataclass(frozen=True)
class StageSettings:
    """budget_s: seconds of training. save_s: seconds between checkpoints.

    muon: the matrices that a module's `hidden_matrices` names go to Muon, the rest to AdamW, both at `learning_rate`.
    """

    budget_s: float
    learning_rate: float = 1e-3
    warm_up_steps: int = 100
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.999
    save_s: float = 60.0
    muon: bool = False


def can_compile() -> bool:
    """Whether torch.compile finds a C++ compiler; without one training stays eager, at about half the speed."""
    return any(shutil.which(name) for name in ("g++", "clang++"))


def save_atomic(payload: dict[str, Any], path: Path) -> None:
    """Write beside, then rename: a full disk or a kill leaves the file before untouched."""
    beside = path.with_suffix(".tmp")
    torch.save(payload, beside)
    os.replace(beside, path)


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
        hidden = list(module.hidden_matrices()) if settings.muon else []  # type: ignore[operator]
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
            self.optimizers["muon"] = torch.optim.Muon(
                hidden, settings.learning_rate, settings.weight_decay, adjust_lr_fn="match_rms_adamw"
            )
        self.ema = EMA(module, settings.ema)
        self.step, self.trained_s = 0, 0.0
        self._resume()

    def _resume(self) -> None:
        path = self.folder / "checkpoint.pt"
        if not path.is_file():
            return
        saved = torch.load(path, weights_only=True, map_location=next(self.module.parameters()).device)
        if saved["name"] != self.name:
            raise PipelineError(
                "checkpoint_of_another_stage",
                f"{path} belongs to stage {saved['name']!r}, not {self.name!r}.",
                "Give each stage its own folder.",
            )
        self.module.load_state_dict(saved["module"])
        self.ema.values = saved["ema"]
        for key, optimizer in self.optimizers.items():
            optimizer.load_state_dict(saved[key])
        self.step, self.trained_s = saved["step"], saved["trained_s"]

    def save(self) -> None:
        payload = {
            "name": self.name,
            "module": self.module.state_dict(),
            "ema": self.ema.values,
            **{key: optimizer.state_dict() for key, optimizer in self.optimizers.items()},
            "step": self.step,
            "trained_s": self.trained_s,
        }
        save_atomic(payload, self.folder / "checkpoint.pt")

    @property
    def done(self) -> bool:
        return self.trained_s >= self.settings.budget_s

    def rate(self) -> float:
        """Linear warm-up, then a cosine over the budget down to 2 % of the peak."""
        share = min(1.0, self.trained_s / self.settings.budget_s)
        rise = min(1.0, (self.step + 1) / self.settings.warm_up_steps)
        return self.settings.learning_rate * rise * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))

    def fit(self, loss: Loss, sample: Callable[[], None] | None = None) -> None:
        """Train until the budget is spent. Raises PipelineError `loss_not_finite`; the last good checkpoint stays."""
        from torch.utils.tensorboard.writer import SummaryWriter

        columns = (
            TextColumn(f"{self.name:<12}"),
            BarColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
        )
        saved_s = self.trained_s
        with SummaryWriter(str(self.folder), purge_step=self.step) as writer, Progress(*columns) as progress:
            task = progress.add_task("", total=self.settings.budget_s, completed=int(self.trained_s), note="")
            while not self.done:
                started = time.perf_counter()
                scalars = self._advance(loss)
                self.trained_s += time.perf_counter() - started
                if self.step % 10 == 0:
                    for key, value in scalars.items():
                        writer.add_scalar(f"{self.name}/{key}", value, self.step)
                note = f"step {self.step} " + " ".join(f"{key} {value:.4f}" for key, value in scalars.items())
                progress.update(task, completed=self.trained_s, note=note)
                if self.step % 100 == 0:
                    progress.console.print(f"{self.name} {self.trained_s:.0f} s {note}", highlight=False)
                if self.trained_s - saved_s > self.settings.save_s or self.done:
                    self.save()
                    saved_s = self.trained_s
                    if sample is not None:
                        sample()

    def _advance(self, loss: Loss) -> dict[str, float]:
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = self.rate()
            optimizer.zero_grad(set_to_none=True)
        value, scalars = loss(self.step)
        value.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.settings.clip)
        if not math.isfinite(value.item()) or not math.isfinite(norm.item()):
            raise PipelineError(
                "loss_not_finite",
                f"At step {self.step} the loss of {self.name} is {value.item()} and its gradient {norm.item()}.",
                f"The state before it is in {self.folder}; lower the learning rate and start again.",
            )
        for optimizer in self.optimizers.values():
            optimizer.step()
        self.step += 1
        self.ema.update(self.module, self.step)
        return {"loss": value.item(), **scalars, "grad": norm.item()}
