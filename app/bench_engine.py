"""The generator alone: what the machine's matrix products can do, what a chunk costs, and how long it takes.

Times come from a worker process as the server starts it; operations are counted in this process, where no clock runs.
Knows no viewer.
"""

import platform
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from time import perf_counter

import numpy as np
from aiortc import RTCRtpCodecParameters
from aiortc.codecs import get_encoder

from app.bench_figures import COUNTED, PASSES, Report, percentile, spread
from app.mailbox import Made, Order
from app.server import versions
from app.worker import OPENMP_WAIT_POLICY, EngineFactory, usable_cores
from app.worker_client import WorkerClient
from pipeline.chunk import Controls
from pipeline.config import ModelConfig
from streaming.frames import VIDEO_CLOCK_HZ, to_video
from streaming.peer import CODECS
from streaming.rates import tune_encoders

PROMPTS = ("a red ball bounces in the park", "a blue fish moves left under water")
SETTLE_CHUNKS = 5  # until the cache is full and slides
SAMPLE_CHUNKS = 12
MATMUL_S = 0.2
SQUARE = 768

Shape = tuple[int, int, int]  # rows, inner, columns


def describe_machine(config: ModelConfig, threads: int) -> Report:
    """What was measured on; computes for about a second."""
    import torch

    from pipeline.codec import multiplies_bfloat16

    torch.set_num_threads(threads)
    precision = "bfloat16" if multiplies_bfloat16() else "float32"
    rates = {
        "matmul_student_gflops": matmul_gflops(student_shapes(config)),
        "matmul_square_gflops": matmul_gflops([(SQUARE, SQUARE, SQUARE)]),
    }
    return {
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "threads": threads,
        "openmp_wait_policy": OPENMP_WAIT_POLICY,
        **rates,
        "matmul_gflops": max(rates.values()),
        "codec_precision": precision,
        "matmul_codec_gflops": matmul_gflops(codec_shapes(config), precision),
        "model": config.name,
        "width": config.width,
        "height": config.height,
        "model_fps": config.fps,
        "frames_per_chunk": config.frames_per_chunk,
        **{f"version_{name}": number for name, number in versions()["versions"].items()},
    }


def cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [text.partition(":")[2].strip() for text in lines if text.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def student_shapes(config: ModelConfig) -> list[Shape]:
    """The products of one transformer layer."""
    student = config.student
    tokens, width = config.chunk * config.tokens_per_frame, student.num_attention_heads * student.attention_head_dim
    return [(tokens, width, width)] * 6 + [(tokens, width, student.ffn_dim), (tokens, student.ffn_dim, width)]


def codec_shapes(config: ModelConfig) -> list[Shape]:
    """The decoder's 3x3 convolutions, one per width, as the products that they are."""
    height, width = config.latent_size
    narrow, middle, wide = config.codec.widths
    scales = ((1, wide), (2, middle), (4, narrow))
    return [(config.chunk * height * width * scale**2, 9 * channels, channels) for scale, channels in scales]


def matmul_gflops(shapes: list[Shape], precision: str = "float32") -> float:
    """Rate over all these products, each at the best that the machine gave: nothing else is faster than this."""
    import torch

    flops = seconds = 0.0
    best_s: dict[Shape, float] = {}
    for shape in shapes:
        if shape not in best_s:
            rows, inner, columns = shape
            kind: torch.dtype = getattr(torch, precision)
            left, right = torch.rand(rows, inner).to(kind), torch.rand(inner, columns).to(kind)
            best_s[shape] = best_of(lambda left=left, right=right: left @ right)  # type: ignore[misc]
        flops += 2 * shape[0] * shape[1] * shape[2]
        seconds += best_s[shape]
    return flops / seconds / 1e9


def best_of(work: Callable[[], object]) -> float:
    best_s, began_s = float("inf"), perf_counter()
    while perf_counter() - began_s < MATMUL_S:
        started_s = perf_counter()
        work()
        best_s = min(best_s, perf_counter() - started_s)
    return best_s


def count_operations(factory: EngineFactory) -> dict[str, float]:
    """GFLOP of each stage of a chunk in the middle of a stream, its prompt just changed and a camera followed."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    counted: dict[str, float] = {}
    # The counter knows the attention of GPUs only.
    cpu_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    count = lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value)  # noqa: E731
    counter = FlopCounterMode(display=False, custom_mapping={cpu_attention: count})

    @contextmanager
    def trace(stage: str) -> Iterator[None]:
        before = counter.get_total_flops()
        yield
        counted[stage] = (counter.get_total_flops() - before) / 1e9

    engine = factory(trace)
    config, state = engine.config, engine.open(seed=0)
    for _ in range(SETTLE_CHUNKS):
        engine.step(state, Controls(PROMPTS[0], seed=0))
    source_THWC = np.zeros((config.frames_per_chunk, config.height, config.width, 3), np.uint8)
    with counter:
        engine.step(state, Controls(PROMPTS[1], seed=0, strength=1.0), source_THWC)
    return counted


def floors(gflop: dict[str, float], matmul_gflops: float, codec_gflops: float) -> Report:
    """How long the stages would take if they were matrix products only, at the best rates that were measured."""
    counted = {stage: gflop[stage] for stage in COUNTED if stage in gflop}
    floor_ms = {
        stage: 1000 * amount / (codec_gflops if stage in ("encode", "decode") else matmul_gflops)
        for stage, amount in counted.items()
    }
    dense = [stage for stage in (*PASSES, "decode") if stage in counted]
    return {
        **{f"{stage}_gflop": amount for stage, amount in counted.items()},
        **{f"{stage}_floor_ms": spent_ms for stage, spent_ms in floor_ms.items()},
        "engine_gflop": sum(counted[stage] for stage in dense),
        "engine_floor_ms": sum(floor_ms[stage] for stage in dense),
    }


async def measure_engine(factory: EngineFactory, threads: int, seconds: float) -> tuple[ModelConfig, Report]:
    """One worker, asked again and again without a pause."""
    worker = WorkerClient(factory, threads=threads)
    started_s = perf_counter()
    try:
        config = await worker.start()
        start_s = perf_counter() - started_s
        calm = [Order(Controls(PROMPTS[0]))]
        await run(worker, calm * SETTLE_CHUNKS)
        steady: list[Made] = []
        began_s = perf_counter()
        while perf_counter() - began_s < seconds or len(steady) < 2:
            steady += await run(worker, calm)
        changed = await run(worker, [Order(Controls(PROMPTS[count % 2])) for count in range(1, SAMPLE_CHUNKS + 1)])
        camera = [made.chunk.frames_THWC for made in steady[-4:]]
        followed = await run(worker, [Order(calm[0].controls, camera[i % len(camera)]) for i in range(SAMPLE_CHUNKS)])
    finally:
        await worker.stop()
    report: Report = {"engine_start_s": start_s}
    report |= summary(config, steady, changed, followed)
    report |= spread("video_encode_ms", encode_ms(config, steady))
    return config, report


async def run(worker: WorkerClient, orders: Iterable[Order]) -> list[Made]:
    return [await worker.step(order) for order in orders]


def summary(config: ModelConfig, steady: list[Made], changed: list[Made], followed: list[Made]) -> Report:
    """steady: one prompt. changed: a new prompt each chunk. followed: a camera."""
    report: Report = {}
    for runs, stages in ((changed, ("text",)), (followed, ("encode",)), (steady, (*PASSES, "decode", "convert"))):
        for stage in stages:
            report |= spread(f"{stage}_ms", [made.stages_ms[stage] for made in runs if stage in made.stages_ms])
    chunk_ms = [made.chunk_ms for made in steady]
    passes_ms = [sum(made.stages_ms.get(stage, 0.0) for stage in PASSES) for made in steady]
    frames = config.frames_per_chunk
    mean_ms = sum(chunk_ms) / len(chunk_ms)

    def fps(values_ms: list[float]) -> float | None:
        middle_ms = percentile(values_ms, 50)
        return frames * 1000 / middle_ms if middle_ms else None

    report |= spread("engine_chunk_ms", chunk_ms)
    report |= spread("engine_camera_chunk_ms", [made.chunk_ms for made in followed])
    return report | {
        "engine_generation_share": mean_ms / (frames * 1000 / config.fps),
        "engine_fps": frames * 1000 / mean_ms,
        "engine_dit_fps": fps(passes_ms),
        "engine_decode_fps": fps([made.stages_ms["decode"] for made in steady if "decode" in made.stages_ms]),
    }


def encode_ms(config: ModelConfig, steady: list[Made]) -> list[float]:
    """Each frame through the encoder that a viewer gets first, as its thread does it: conversion included."""
    rates = tune_encoders(config.fps, config.width, config.height)
    encoder = get_encoder(RTCRtpCodecParameters(CODECS[0], VIDEO_CLOCK_HZ))
    encoder.target_bitrate = rates.start_bps
    frames = (frame for made in steady for frame in made.chunk.frames_THWC)
    spent_ms: list[float] = []
    for index, frame_HWC in enumerate(islice(frames, 240)):
        frame = to_video(frame_HWC, round(index * VIDEO_CLOCK_HZ / config.fps))
        started_s = perf_counter()
        encoder.encode(frame)
        spent_ms.append((perf_counter() - started_s) * 1000)
    return spent_ms
