"""Times of a sparse chunk against the share of its tiles, beside the dense chunk of the same state and noise.

The share is given, so that it is exact: painted (all passes and the decoder alone), to a stream that follows a camera
(motion mask and encoder as well), and to a text (whose first pass is dense). Knows no pictures' quality.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter, process_time
from typing import Any, TypeVar

import numpy as np

from app.region_scenes import scenes, shoot
from pipeline.chunk import Controls

Row = dict[str, Any]
T = TypeVar("T")

SPEED = "speed"
PAINTED, WEBCAM, TEXT = "painted", "webcam", "text"
SHARES = (0.1, 0.2, 0.3, 1.0)
PAINTED_SHARES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
WARM_CHUNKS = 3  # until tiles can be held
WIDE = "640x384 random"


@dataclass(frozen=True)
class Spent:
    wall_ms: float
    cpu_ms: float


def timed(call: Callable[[], T]) -> tuple[T, Spent]:
    wall_s, cpu_s = perf_counter(), process_time()
    made = call()
    return made, Spent((perf_counter() - wall_s) * 1000, (process_time() - cpu_s) * 1000)


def paired(dense: list[Spent], sparse: list[Spent]) -> Row:
    """Medians. cpu_speedup: of processor time, which other programs on the machine hardly change."""
    dense_ms, sparse_ms = (float(np.median([spent.wall_ms for spent in each])) for each in (dense, sparse))
    dense_cpu, sparse_cpu = (float(np.median([spent.cpu_ms for spent in each])) for each in (dense, sparse))
    return {
        "dense_ms": dense_ms,
        "sparse_ms": sparse_ms,
        "speedup": dense_ms / sparse_ms,
        "cpu_speedup": dense_cpu / sparse_cpu,
    }


def speeds(
    engine: Any, size: str, chunks: int, dial: float, painted_shares: tuple[float, ...] = PAINTED_SHARES
) -> list[Row]:
    """A row for each mode and share."""
    return [
        {"size": size, "mode": mode, "scenario": SPEED, "mask": "given"} | row
        for mode, shares in ((PAINTED, painted_shares), (WEBCAM, SHARES), (TEXT, SHARES))
        for row in speeds_of(engine, mode, chunks, dial, shares)
    ]


def speeds_of(engine: Any, mode: str, chunks: int, dial: float, shares: tuple[float, ...]) -> list[Row]:
    """active_fraction: what was computed. Dense and sparse take turns in going first."""
    from app.region_given import GivenEngine

    given, plain = GivenEngine(engine), Controls("")
    tiles, on = engine.config.tiles, replace(plain, regions=dial)
    speaker = scenes(engine.config.width, engine.config.height)["speaker"]
    state, rows = given.open(plain.seed), []
    assert state.regions is not None, "a model without whole tiles is dense at every share"

    def source() -> np.ndarray | None:
        return shoot(speaker, state.index)[1] if mode == WEBCAM else None

    for _ in range(WARM_CHUNKS):
        given.step(state, replace(plain, paint=painted(np.ones(tiles, bool))) if mode == PAINTED else on, source())
    for share in shares:
        mask = patch(tiles, share)
        given.given_HW = None if mask.all() else mask
        controls = replace(plain, paint=painted(mask)) if mode == PAINTED else on
        active: list[float] = []
        spent: dict[str, list[Spent]] = {"dense": [], "sparse": []}
        for number in range(chunks):
            seen, twin = source(), deepcopy(state)
            steps = {
                "dense": partial(given.step, twin, plain, seen),
                "sparse": partial(given.step, state, controls, seen),
            }
            for name in sorted(steps, reverse=bool(number % 2)):
                chunk, once = timed(steps[name])
                spent[name].append(once)
                if name == "sparse":
                    active.append(1.0 if chunk.active_HW is None else float(chunk.active_HW.mean()))
        rows.append({"active_fraction": float(np.mean(active))} | paired(**spent))
    return rows


def painted(mask_HW: np.ndarray) -> str:
    """As `Controls.paint` wants it."""
    return "".join("1" if cell else "0" for cell in mask_HW.flat)


def cost_model(shares: list[float], costs: list[float]) -> tuple[float, float]:
    """fixed, rising: cost = fixed + rising * share, by least squares over two shares or more.

    costs: sparse over dense time at each share. fixed: what fewer tiles do not save.
    """
    rising, fixed = np.polyfit(shares, costs, 1)
    return float(fixed), float(rising)


def patch(tiles: tuple[int, int], share: float) -> np.ndarray:
    """A block of so many tiles, as square as the picture allows."""
    rows, columns = tiles
    mask, count = np.zeros(tiles, bool), max(1, round(share * rows * columns))
    side = min(rows, max(1, round(count**0.5)))
    order = [(y, x) for x in range(columns) for y in range(side)]
    order += [(y, x) for y in range(side, rows) for x in range(columns)]
    for y, x in order[:count]:
        mask[y, x] = True
    return mask


def wide_engine() -> Any:
    """A compute-bound size: layers half as wide as the smallest Wan's, 1,920 tokens of 16 pixels a chunk, random
    weights."""
    import torch

    from pipeline.codec import PocketCodec
    from pipeline.config import CodecConfig, ModelConfig, StudentConfig
    from pipeline.engine import Engine
    from pipeline.student import Student
    from pipeline.text import TextEncoder

    torch.manual_seed(0)
    student = StudentConfig(
        num_attention_heads=6, attention_head_dim=128, in_channels=32, out_channels=32, ffn_dim=4096, num_layers=2
    )
    codec = CodecConfig(spatial_stride=8, widths=(16, 24, 32))
    config = ModelConfig(name="random", width=640, height=384, student=student, codec=codec)
    parts = (PocketCodec(codec), TextEncoder(config.text, student.text_dim), Student(student))
    for part in parts:
        part.eval().requires_grad_(False)
    return Engine(config, *parts)
