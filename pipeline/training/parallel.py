"""Several processes train as one: who they are, how a model is cut between them, and a Trainer that gathers its state.

A model is cut by FSDP2, layer by layer; weights, averages and moments stay in single precision, passes may run in
bfloat16. Alone the same lines run with one share. A checkpoint holds whole tensors, so any number of processes can go
on where another number stopped. Knows nothing of data and losses.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

from pipeline.attention import Attend
from pipeline.student import Student, TextKV
from pipeline.training.loop import Trainer
from pipeline.training.muon import CutMuon
from pipeline.training.settings import StageSettings


@dataclass(frozen=True)
class Ranks:
    """The processes that train together, seen from one of them."""

    rank: int
    count: int
    device: torch.device
    mesh: DeviceMesh

    @property
    def first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Until all are here."""
        self.mean([0.0])

    def mean(self, values: list[float]) -> list[float]:
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        means: list[float] = (sums / self.count).tolist()
        return means


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """Join the processes that torchrun started, if it did, and part at the end. A group that is there already is kept.

    device: cpu or cuda; each process on a machine takes the GPU of its number there.
    """
    kind = torch.device(device).type
    ours = not dist.is_initialized()
    if ours:
        backend = "nccl" if kind == "cuda" else "gloo"
        if dist.is_torchelastic_launched():
            dist.init_process_group(backend)
        else:
            alone = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group(backend, store=alone, rank=0, world_size=1)
    try:
        place = torch.device(device)
        if kind == "cuda":
            if dist.get_world_size() > 1:
                place = torch.device(kind, dist.get_node_local_rank(fallback_rank=0))
            torch.cuda.set_device(place)
        count = dist.get_world_size()
        yield Ranks(dist.get_rank(), count, place, init_device_mesh(kind, (count,)))
    finally:
        if ours:
            dist.destroy_process_group()


def shard(root: nn.Module, student: Student, ranks: Ranks, *, precision: str, checkpointing: bool) -> None:
    """Cut the student's layers one by one, and the rest of root with root; each is whole while it computes.

    checkpointing: a layer remembers what goes in and computes the rest again on the way back.
    """
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)  # modulation stays in single precision
    if precision == "bf16":
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    blocks = student.model.blocks
    through = partial(_again, student) if checkpointing else partial(Student.layer, student)
    for index, block in enumerate(blocks):
        fully_shard(block, mesh=ranks.mesh, mp_policy=policy)
        # The student reaches into its blocks; this method is the door at which their weights are gathered.
        block.pass_through = partial(through, index)
        register_fsdp_forward_method(block, "pass_through")

    def layer(index: int, tokens: Tensor, modulation: Tensor, text: TextKV, attend: Attend) -> Tensor:
        return blocks[index].pass_through(tokens, modulation, text, attend)

    student.layer = layer  # type: ignore[method-assign]
    fully_shard(root, mesh=ranks.mesh, mp_policy=policy)


def _again(student: Student, index: int, *given: Any) -> Tensor:
    out: Tensor = checkpoint(
        partial(Student.layer, student), index, *given, use_reentrant=False, preserve_rng_state=False
    )
    return out


def whole(state: Any, keep: bool = True) -> Any:
    """The state with every cut tensor gathered, on the CPU. All processes have to ask; those that keep get them."""
    if isinstance(state, DTensor):
        full = state.full_tensor()
        return full.cpu() if keep else None
    if isinstance(state, Mapping):
        return {key: whole(value, keep) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(whole(value, keep) for value in state)
    return state.cpu() if isinstance(state, Tensor) else state


class ShardedTrainer(Trainer):
    """The loop of all stages, where each process holds its share of every weight and sees its share of every batch."""

    def __init__(self, name: str, folder: Path, module: nn.Module, settings: StageSettings, ranks: Ranks) -> None:
        self.ranks = ranks
        super().__init__(name, folder, module, settings)

    @property
    def writes(self) -> bool:
        return self.ranks.first

    @property
    def reads_onto(self) -> torch.device:
        return torch.device("cpu")

    def state(self) -> dict[str, Any]:
        gathered: dict[str, Any] = whole(super().state(), self.writes)
        return gathered

    def save(self) -> None:
        state = self.state()
        if self.writes:
            self.write(state)
        self.ranks.wait()

    def average(self) -> dict[str, Tensor]:
        """The averaged weights, whole in the first process."""
        gathered: dict[str, Tensor] = whole(self.ema.values, self.writes)
        return gathered

    def _matrices(self) -> list[nn.Parameter]:
        return [value for value in self.module.model.blocks.parameters() if value.ndim == 2]  # type: ignore[union-attr]

    def _muon(self, matrices: list[nn.Parameter]) -> torch.optim.Optimizer:
        return CutMuon(matrices, self.settings.learning_rate, self.settings.weight_decay)

    def _own(self, saved: dict[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: _cut(value, like.get(name)) for name, value in saved.items()}

    def _agreed(self, values: list[float]) -> list[float]:
        return self.ranks.mean(values)

    def _clip(self) -> float:
        norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.settings.clip)
        return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


def _cut(value: Tensor, like: Tensor | None) -> Tensor:
    """A tensor of another shape stays whole: a count, or one that the model will refuse."""
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
