"""A Wan student of random weights on a CUDA GPU: memory and time of each stage over a long stream, as Markdown.

    python benchmarks/wan.py --family longlive --chunks 200 --size 832x480

What a pass costs does not hang on what its weights say. Without a GPU every figure is "not measured". The text encoder
is not part of it: prompts are random embeddings.
"""

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pipeline.chunk import Controls
from pipeline.engine import Engine
from pipeline.fit import blank
from pipeline.memory import Setup, plan
from pipeline.models import Family, family
from pipeline.prompts import Prompts
from pipeline.tiny_codec import TinyDecoder, TinyEncoder
from pipeline.umt5 import PLACES
from pipeline.wan import WanPair
from pipeline.wan_codec import WanCodec

STAGES = ("denoise", "cache", "decode", "convert", "chunk")
NOT_MEASURED = "not measured"
SETTLE_CHUNKS = 10


class Watch:
    """Milliseconds of each stage, the device's own work included."""

    def __init__(self) -> None:
        self.spent_ms: dict[str, list[float]] = defaultdict(list)

    @contextmanager
    def trace(self, stage: str) -> Iterator[None]:
        torch.cuda.synchronize()
        started_s = time.perf_counter()
        yield
        torch.cuda.synchronize()
        self.spent_ms[stage.split("_")[0]].append((time.perf_counter() - started_s) * 1000)


def build(row: Family, width: int, height: int, decoder: str, watch: Watch) -> Engine:
    """An engine of this family's shapes, filled with noise, in bfloat16 on the GPU."""
    from diffusers import AutoencoderKLWan

    config = row.config(width, height)
    student = blank(config.student)
    rope = student.model.rope  # its tables are no weights, and stay as they are
    student.bfloat16().to_empty(device="cuda")
    student.model.rope = type(rope)(rope.attention_head_dim, rope.patch_size, rope.max_seq_len)
    for value in student.parameters():
        torch.nn.init.normal_(value, std=0.02)
    if decoder == "tiny":
        pair = WanPair(TinyEncoder(), TinyDecoder()).bfloat16()
    else:
        whole = WanCodec(AutoencoderKLWan())
        pair = WanPair(whole, whole).bfloat16()

    def read(prompt: str) -> Tensor:
        return torch.randn(64, config.student.text_dim, generator=torch.Generator().manual_seed(len(prompt)))

    pair.eval().requires_grad_(False)
    student.eval().requires_grad_(False)
    return Engine(config, pair, Prompts(read, PLACES), student, device="cuda", trace=watch.trace)


def measure(row: Family, width: int, height: int, decoder: str, chunks: int) -> dict[str, str]:
    if not torch.cuda.is_available():
        names = [*(f"{stage} ms" for stage in STAGES), "frames per second", "memory", "growth"]
        return dict.fromkeys(names, NOT_MEASURED)
    watch = Watch()
    engine = build(row, width, height, decoder, watch)
    state, controls = engine.open(7), Controls("a")
    sums: dict[str, list[float]] = defaultdict(list)
    held: list[int] = []
    torch.cuda.reset_peak_memory_stats()
    for index in range(chunks):
        watch.spent_ms.clear()
        started_s = time.perf_counter()
        engine.step(state, controls)
        sums["chunk"].append((time.perf_counter() - started_s) * 1000)
        for stage, spent in watch.spent_ms.items():
            sums[stage].append(sum(spent))
        if index >= SETTLE_CHUNKS:
            held.append(torch.cuda.memory_allocated())
        print(f"\r{index + 1} of {chunks}", end="", file=sys.stderr)
    found = {}
    for stage in STAGES:
        late = sorted(sums[stage][SETTLE_CHUNKS:])
        found[f"{stage} ms"] = f"{late[len(late) // 2]:.0f}" if late else "none of its own"
    late = sorted(sums["chunk"][SETTLE_CHUNKS:])
    found["frames per second"] = f"{1000 * engine.config.frames_per_chunk / late[len(late) // 2]:.1f}"
    found["memory"] = f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB"
    found["growth"] = f"{(held[-1] - held[0]) / 1e6:.1f} MB"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", action="append", help="a name of `models list`; may be repeated")
    parser.add_argument("--size", default="832x480")
    parser.add_argument("--decoder", choices=["tiny", "full"], default="tiny")
    parser.add_argument("--chunks", type=int, default=200)
    told = parser.parse_args()
    width, height = map(int, told.size.split("x"))
    rows: list[tuple[str, dict[str, str]]] = []
    for name in told.family or ["self-forcing", "longlive", "streamdiffusion-v2"]:
        row = family(name)
        setup = Setup(width=width, height=height, tiny=told.decoder == "tiny", text_on="cpu")
        reckoned = f"{plan(row, setup).device / 1e9:.1f} GB"
        rows.append((name, measure(row, width, height, told.decoder, told.chunks) | {"reckoned": reckoned}))
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    print(f"\n{card}, torch {torch.__version__}, {told.size}, {told.chunks} chunks, {told.decoder} decoder, bfloat16\n")
    print("| model | " + " | ".join(rows[0][1]) + " |")
    print("|---|" + "---|" * len(rows[0][1]))
    for name, found in rows:
        print(f"| `{name}` | " + " | ".join(found.values()) + " |")


if __name__ == "__main__":
    main()
