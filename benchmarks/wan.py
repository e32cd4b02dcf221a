"""Wan students of random weights: memory and time of each stage over a long stream, for the table of docs/models.md.

    python benchmarks/wan.py --regions                                           # all families, on a CUDA GPU
    python benchmarks/wan.py --family longlive --family krea-realtime --chunks 60
    python benchmarks/wan.py --device cpu --tiny --width 64 --height 64 --chunks 6   # whether it runs

What a pass costs does not hang on what its weights say. The text encoder is not part of it: a prompt is a random
embedding. Standard output has one JSON object for each model, as soon as it is done, and at the end all of them as
Markdown; a model that does not fit says so, and the next one follows.
"""

import gc
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from statistics import median
from time import perf_counter
from typing import Annotated, Any, Literal

import numpy as np
import psutil
import torch
import typer
from torch import Tensor

from app.errors import SPOKEN, AppError, memory_short
from app.region_speed import painted, patch
from app.shelf import room
from pipeline.chunk import Controls
from pipeline.config import ModelConfig, StudentConfig
from pipeline.engine import Engine, no_trace
from pipeline.family import WAN_SIZE, Family
from pipeline.fit import blank
from pipeline.memory import Setup, plan
from pipeline.models import FAMILIES, family
from pipeline.narrow import fill
from pipeline.prompts import Prompts
from pipeline.state import StreamState
from pipeline.tiny_codec import TinyDecoder, TinyEncoder
from pipeline.umt5 import PLACES
from pipeline.wan import WanPair
from pipeline.wan_codec import WanCodec

STAGES = ("denoise", "cache", "decode", "convert")
SHARES = (0.1, 0.2, 0.3)
SETTLED = 20
"""Chunks until every family's window is full, so that a chunk costs what all later ones do."""
FEW = 8
"""Chunks of a camera, and of each share of tiles. The first one is not counted."""
TINY = StudentConfig(
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=16,
    out_channels=16,
    text_dim=32,
    freq_dim=32,
    ffn_dim=48,
    num_layers=2,
)
NOT_MEASURED = "not measured"
Row = dict[str, Any]


@dataclass
class Gauge:
    """Bytes that tensors take on a GPU. A CPU's are those of the process, which Python's own habits move too."""

    device: torch.device
    most_bytes: int = 0

    def finish(self) -> None:
        """Wait for all that the device was told to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def begin(self) -> None:
        """What was needed before does not count."""
        self.finish()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        self.most_bytes = 0

    def held_bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        held = int(psutil.Process().memory_info().rss)
        self.most_bytes = max(self.most_bytes, held)
        return held

    def peak(self) -> Row:
        """memory_bytes: of tensors. reserved_bytes: with what the allocator keeps for later, so the room to have."""
        if self.device.type != "cuda":
            return {"memory_bytes": self.most_bytes or None}
        at_most = torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device)
        return dict(zip(("memory_bytes", "reserved_bytes"), at_most, strict=True))


@dataclass
class Run:
    """One model's chunks, and what is known of them: all of it that far, also if memory runs out in the middle."""

    gauge: Gauge
    spent_ms: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    stages_ms: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    row: Row = field(default_factory=dict)

    @contextmanager
    def trace(self, stage: str) -> Iterator[None]:
        """A stage with the device's own work; this stops the device between two of them."""
        self.gauge.finish()
        started_s = perf_counter()
        yield
        self.gauge.finish()
        self.stages_ms[stage.split("_")[0]] += (perf_counter() - started_s) * 1000

    def chunk(self, engine: Engine, state: StreamState, controls: Controls, source: np.ndarray | None = None) -> float:
        """The milliseconds of a whole chunk."""
        self.gauge.finish()
        started_s = perf_counter()
        engine.step(state, controls, source)
        self.gauge.finish()
        return (perf_counter() - started_s) * 1000

    def take_stages(self, engine: Engine, *step: Any) -> None:
        """A chunk whose stages are timed, and which is no measure of a whole chunk therefore."""
        engine.trace = self.trace
        self.stages_ms.clear()
        self.chunk(engine, *step)
        engine.trace = no_trace
        for stage, spent in self.stages_ms.items():
            self.spent_ms[stage].append(spent)

    def stream(self, engine: Engine, state: StreamState, controls: Controls, chunks: int) -> None:
        """Chunk after chunk; of those that settled, whole ones and ones in stages take turns."""
        settled = min(SETTLED, chunks // 2)
        self.gauge.begin()
        begun = None
        for index in range(chunks):
            if index >= settled and index % 2:
                self.take_stages(engine, state, controls)
            else:
                whole_ms = self.chunk(engine, state, controls)
                self.spent_ms["chunk"] += [whole_ms] if index >= settled else []
            held = self.gauge.held_bytes()
            begun = held if index == settled else begun
            if begun is not None:
                self.row |= {"chunks": index + 1, "settled_chunks": settled, "growth_bytes": held - begun}
            self.row |= self.gauge.peak()
            print(f"\r{engine.config.name}: {index + 1} of {chunks}", end="", file=sys.stderr)
        print(file=sys.stderr)

    def camera(self, engine: Engine, state: StreamState, controls: Controls) -> None:
        config = engine.config
        shape = (config.frames_per_chunk, config.height, config.width, 3)
        source = np.random.default_rng(7).integers(0, 256, shape, dtype=np.uint8)
        others = Run(self.gauge)
        for _ in range(FEW):
            others.take_stages(engine, state, controls, source)
        self.spent_ms["encode"] = others.spent_ms["encode"][1:]

    def regions(self, engine: Engine, state: StreamState, controls: Controls) -> None:
        """A painted block of so many tiles; the rest is held."""
        tiles = engine.config.tiles
        if tiles is None:
            return
        for share in (1.0, *SHARES):
            some = replace(controls, paint=painted(patch(tiles, share)))
            spent = [self.chunk(engine, state, some) for _ in range(FEW)]
            self.spent_ms[_share(share)] = spent[1:]

    def told(self) -> Row:
        """All figures, medians of milliseconds; None: not measured."""
        names = (*STAGES, "encode", "chunk", *map(_share, SHARES))
        found = {f"{name}_ms": median(self.spent_ms[name]) if self.spent_ms[name] else None for name in names}
        return dict.fromkeys(("memory_bytes", "reserved_bytes", "growth_bytes")) | found | self.row


def tiny_config(config: ModelConfig) -> ModelConfig:
    """Of a student of two narrow layers, with what its transformer has more than Wan's."""
    whole = config.student
    far = {name: getattr(whole, name) for name in ("compressed_patch_size", "full_chunk_limit", "gate_value")}
    return replace(config, student=replace(TINY, **far, deltatime_type=whole.deltatime_type))


def _share(share: float) -> str:
    return f"tiles_{100 * share:.0f}"


def build(config: ModelConfig, *, device: str, tiny_codec: bool, narrow_codec: bool, bits: int) -> Engine:
    """Noise in a model's shapes, held as `load_wan` holds weights. narrow_codec: of a small autoencoder."""
    from diffusers import AutoencoderKLWan

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    student = blank(config.student)
    names = {name: value.shape for name, value in student.model.state_dict().items()}
    weights = ((name, torch.randn(shape, dtype=dtype, device=device) / 50) for name, shape in names.items())
    fill(student.model, weights, dtype, bits=bits, inside="blocks.", device=device)
    if tiny_codec:
        pair = WanPair(TinyEncoder(), TinyDecoder())
    else:
        shape = {"base_dim": 8, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1} if narrow_codec else {}
        whole = WanCodec(AutoencoderKLWan(**shape))
        pair = WanPair(whole, whole)

    def read(prompt: str) -> Tensor:
        return torch.randn(64, config.student.text_dim, generator=torch.Generator().manual_seed(len(prompt)))

    pair.to(dtype).eval().requires_grad_(False)
    student.eval().requires_grad_(False)
    return Engine(config, pair, Prompts(read, PLACES), student, device=device)


def measure(run: Run, config: ModelConfig, *, chunks: int, regions: bool, **how: Any) -> None:
    run.gauge.begin()  # nothing of the model before is left
    engine = build(config, **how)
    started_s = perf_counter()
    engine.warm_up()
    run.gauge.finish()
    run.row["warm_up_s"] = perf_counter() - started_s
    state, controls = engine.open(7), Controls("a")
    run.stream(engine, state, controls, chunks)
    run.camera(engine, state, controls)
    if regions:
        run.regions(engine, state, controls)


def attempt(run: Run, config: ModelConfig, **how: Any) -> str | None:
    """What to say where there was no room for all of it."""
    try:
        measure(run, config, **how)
    except Exception as error:
        if told := memory_short(error):
            return told.message
        raise
    return None


def table(rows: list[Row], regions: bool) -> str:
    """Of all rows, as docs/models.md has it."""
    heads = [*(f"{stage} ms" for stage in (*STAGES, "encode", "chunk")), "frames per second"]
    heads += [f"{100 * share:.0f} % of tiles, ms" for share in SHARES] if regions else []
    heads += ["memory", "reserved", "reckoned", "growth"]
    lines = [f"| model | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    for row in rows:
        shares = [_ms(row[f"{_share(share)}_ms"]) if row["regions"] else "refused" for share in SHARES]
        stages = [_ms(row[f"{stage}_ms"]) for stage in (*STAGES, "encode", "chunk")]
        if row["chunk_ms"] and row["cache_ms"] is None:
            stages[STAGES.index("cache")] = "none of its own"
        rate = f"{1000 * row['frames_per_chunk'] / row['chunk_ms']:.1f}" if row["chunk_ms"] else NOT_MEASURED
        room_ = [_amount(row[f"{name}_bytes"]) for name in ("memory", "reserved", "reckoned")]
        growth = NOT_MEASURED if row["growth_bytes"] is None else f"{row['growth_bytes'] / 1e6:.1f} MB"
        lines.append(
            f"| `{row['model']}` | {' | '.join((*stages, rate, *(shares if regions else []), *room_, growth))} |"
        )
    lines += [f"\n`{row['model']}`: {row['trouble']}" for row in rows if row["trouble"]]
    return "\n".join(lines)


def _ms(spent: float | None) -> str:
    return NOT_MEASURED if spent is None else f"{spent:.0f}"


def _amount(count: int | None) -> str:
    return NOT_MEASURED if count is None else f"{count / 1e9:.1f} GB"


def main(
    names: Annotated[list[str] | None, typer.Option("--family", help="Of `models list`; may be repeated.")] = None,
    device: Annotated[str, typer.Option(help="cuda, cuda:1; or cpu, to see whether it runs.")] = "cuda",
    width: Annotated[int, typer.Option(min=16)] = WAN_SIZE[0],
    height: Annotated[int, typer.Option(min=16)] = WAN_SIZE[1],
    chunks: Annotated[int, typer.Option(min=4)] = 200,
    decoder: Annotated[Literal["tiny", "full"], typer.Option(help="The codec.")] = "tiny",
    bits: Annotated[Literal["16", "8"], typer.Option(help="Of the student's layers.")] = "16",
    regions: Annotated[bool, typer.Option("--regions", help="Chunks with a given share of tiles too.")] = False,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="A student of two narrow layers instead of the real shape.")
    ] = False,
) -> None:
    rows: list[Row] = []
    size = {"width": width, "height": height}
    try:
        room(device)
        chosen = [on_wan(name) for name in names] if names else [row for row in FAMILIES if row.layout == "wan"]
        plans = [
            plan(row, Setup(**size, cpu=device == "cpu", tiny=decoder == "tiny", bits=int(bits))) for row in chosen
        ]
    except SPOKEN as error:
        print(f"{error.code}: {error.message} {error.remedy}", file=sys.stderr)
        raise typer.Exit(2) from error
    card = "CPU" if device == "cpu" else torch.cuda.get_device_name(device)
    setting = {"device": card, "torch": torch.__version__, **size, "decoder": decoder, "bits": int(bits), "tiny": tiny}
    how = {"device": device, "tiny_codec": decoder == "tiny", "narrow_codec": tiny, "bits": int(bits)}
    try:
        for row, wants in zip(chosen, plans, strict=True):
            config, run = row.config(width, height), Run(Gauge(torch.device(device)))
            config = tiny_config(config) if tiny else config
            trouble = attempt(run, config, chunks=chunks, regions=regions, **how)
            reckoned = None if tiny else wants.student + wants.past + wants.work + wants.codec
            known = {"model": row.name, **setting, "frames_per_chunk": config.frames_per_chunk}
            known["regions"] = config.tiles is not None
            rows.append(known | {"reckoned_bytes": reckoned} | run.told() | {"trouble": trouble})
            print(json.dumps(rows[-1]), flush=True)
    finally:  # Ctrl-C too ends with what is known
        if rows:
            print(f"\n{', '.join(f'{name} {value}' for name, value in setting.items())}, {chunks} chunks\n")
            print(table(rows, regions))


def on_wan(name: str) -> Family:
    """Raises PipelineError (`model_unknown`), AppError (`model_not_served`)."""
    row = family(name)
    if row.layout != "wan":
        raise AppError("model_not_served", f"{row.title} has other modules than Wan.", "Choose a family on Wan.")
    return row


if __name__ == "__main__":
    typer.run(main)
