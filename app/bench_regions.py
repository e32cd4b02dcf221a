"""`stillstream bench --regions`: dense and sparse chunks side by side, from the same state and with the same noise.

Every chunk of a sparse stream is made twice, once more densely from a copy of the state before it, so that pictures and
times pair up. A third, dense with another seed, says how much of a difference means nothing. Knows no viewer.
"""

from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np

from app import region_figures as figures
from app.errors import DENSE_ONLY, AppError
from app.perceptual import Distance, find_lpips, perceived
from app.region_scenes import scenes, shoot
from pipeline.chunk import Chunk, Controls
from pipeline.config import ModelConfig

Row = dict[str, Any]

TEXTS = (
    "an orange robot sways on a stage in front of an audience",
    "a blue fish moves left under water, neon style",
    "a green flower stands still in the park, pencil sketch",
)
FOLLOWED = "a room with an audience"
SHARES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
WIDE_SHARES = (0.1, 0.2, 0.3, 1.0)
# Named like scenarios: times against the share of tiles, and what active tokens see of held ones.
SPEED, WIDE, CARRY = "speed", "speed-wide", "carry"
OTHER_SEED = 1_000_003
DRAWS = 4  # of a text's chunk, to tell motion from chance
TOLD = (
    *("active_fraction", "speedup", "cpu_speedup", "psnr_active", "ssim_active", "gmsd_active", "lpips_active"),
    *("static_error_ratio", "seam", "pop", "flow_ratio", "mask_recall", "mask_precision"),
)
READ = ("motion_gap", "probe_gap", "fd_ratio")  # of free runs, by a probe; null without one
FREE, FREE_CHUNKS = "free run", 250
KEYS = ("size", "mode", "scenario", "dense_ms", "sparse_ms", *TOLD, *READ)


def measure_regions(
    model: Path | None, threads: int, dial: float, chunks: int, names: list[str], probe: Path | None = None
) -> list[Row]:
    """The speed of given masks first, then every scenario. names: what to run of these; none: all.

    probe: reads free runs, which are left out without it. Raises AppError (`probe_unreadable`, `regions_unsupported`,
    `scenario_unknown`).
    """
    from app.probe import read_probe
    from app.region_free import free_run
    from pipeline.engine import Engine

    reader, lpips = None if probe is None else read_probe(probe), find_lpips()
    engine = Engine.load(model, threads=threads)
    config = engine.config
    check_asked(config, names)
    size = f"{config.width}x{config.height}"
    rows: list[Row] = []
    if not names or SPEED in names:
        rows += speeds(engine, size, chunks)
    if not names or WIDE in names:
        rows += speeds(wide_engine(), "640x384 random", 2, WIDE_SHARES)
    if not names or CARRY in names:
        rows += carries(engine, size)
    for name, (scene, noise) in scenes(config.width, config.height).items():
        if not names or name in names:
            sources = [shoot(scene, noise, index) for index in range(chunks)]
            made = run(engine, Controls(FOLLOWED, regions=dial), sources, name, lpips)
            rows.append(made | {"size": size, "mode": "webcam"})
    for name in TEXTS:
        if not names or name in names:
            made = run(engine, Controls(name, regions=dial), [None] * chunks, name, lpips)
            rows.append(made | {"size": size, "mode": "text"})
    if reader is not None and (not names or FREE in names):
        for mode in ("webcam", "text"):
            gaps = free_run(engine, reader, dial, FREE_CHUNKS, mode == "webcam")
            rows.append({"size": size, "mode": mode, "scenario": FREE} | gaps)
    return [{key: row.get(key) for key in KEYS} for row in rows]


def check_asked(config: ModelConfig, names: list[str]) -> None:
    """Raises AppError (`regions_unsupported`, `scenario_unknown`)."""
    if config.tiles is None:
        raise DENSE_ONLY
    known = (SPEED, WIDE, CARRY, *scenes(config.width, config.height), *TEXTS, FREE)
    for name in names:
        if name not in known:
            told = ", ".join(f'"{each}"' if " " in each else each for each in known)
            raise AppError("scenario_unknown", f"There is no scenario {name!r}.", f"Choose of: {told}.")


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


def speeds(engine: Any, size: str, chunks: int, shares: tuple[float, ...] = SHARES) -> list[Row]:
    """Times against the share of tiles, the mask painted and so exact. All four passes, with the codec."""
    rows_, columns = engine.config.tiles
    state, prompt = engine.open(7), Controls("")
    for _ in range(3):
        engine.step(state, replace(prompt, paint="1" * (rows_ * columns)))
    rows: list[Row] = []
    for share in shares:
        mask = np.zeros((rows_, columns), bool)
        side = max(1, round((share * rows_ * columns) ** 0.5))
        count = max(1, round(share * rows_ * columns))
        order = [(y, x) for x in range(columns) for y in range(min(side, rows_))] + [
            (y, x) for y in range(side, rows_) for x in range(columns)
        ]
        for y, x in order[:count]:
            mask[y, x] = True
        paint = "".join("1" if cell else "0" for cell in mask.flat)
        sparse, dense = Clock(), Clock()
        for _ in range(chunks):
            other = deepcopy(state)
            dense.time(lambda other=other: engine.step(other, prompt))
            if mask.all():  # everything moves: a dense chunk, and what remembering it costs
                state.regions.ready = False
            sparse.time(lambda paint=paint: engine.step(state, replace(prompt, paint=paint)))
        rows.append({"size": size, "mode": "given mask", "active_fraction": float(mask.mean())} | paired(dense, sparse))
    return rows


def carries(engine: Any, size: str, chunks: int = 3) -> list[Row]:
    """The keys that may stand for held tokens: likeness to a dense chunk within a painted mask around a mover."""
    rows_, columns = engine.config.tiles
    mask = np.zeros((rows_, columns), bool)
    mask[rows_ // 6 : rows_ - 1, columns * 3 // 10 : columns * 8 // 10] = True
    paint, inner = "".join("1" if cell else "0" for cell in mask.flat), figures.inside(figures.over_pixels(mask))
    found: dict[str, list[float | None]] = {"same_step": [], "clean": [], "none": []}
    for seed in (7, 8):
        begun, plain = engine.open(seed), Controls(TEXTS[0], seed=seed)
        for _ in range(2 * chunks):
            engine.step(begun, replace(plain, paint="1" * mask.size))
        for carry, likeness in found.items():
            state = deepcopy(begun)
            state.regions.carry = carry
            for _ in range(chunks):
                twin = deepcopy(state)
                ours, dense = engine.step(state, replace(plain, paint=paint)), engine.step(twin, plain)
                likeness.append(figures.psnr(ours.frames_THWC, dense.frames_THWC, inner))
    return [
        {"size": size, "mode": "carry", "scenario": carry, "psnr_active": figures.mean(likeness)}
        | {"active_fraction": float(mask.mean())}
        for carry, likeness in found.items()
    ]


def held_pictures(engine: Any, state: Any) -> np.ndarray:
    """What the tiles hold, as a dense stream shows it while it stands: the pictures of one latent frame."""
    import torch

    from pipeline.codec import frames_to_pixels

    codec, latents_TCHW = engine.codec, state.regions.latent_BCHW.expand(2, -1, -1, -1)
    with torch.inference_mode():
        frames_TCHW = codec.decode_push(codec.remember(), latents_TCHW)[-engine.config.codec.frames :]
    pictures: np.ndarray = frames_to_pixels(frames_TCHW).cpu().numpy()
    return pictures


@dataclass
class Clock:
    """Wall and processor time of calls, in milliseconds."""

    wall_ms: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)

    def time(self, call: Any) -> Any:
        wall_s, cpu_s = perf_counter(), process_time()
        made = call()
        self.wall_ms.append((perf_counter() - wall_s) * 1000)
        self.cpu_ms.append((process_time() - cpu_s) * 1000)
        return made


def paired(dense: Clock, sparse: Clock) -> Row:
    """Medians. cpu_speedup: of processor time, which other programs on the machine hardly change."""
    dense_ms, sparse_ms = float(np.median(dense.wall_ms)), float(np.median(sparse.wall_ms))
    cpu = float(np.median(dense.cpu_ms)) / float(np.median(sparse.cpu_ms))
    return {"dense_ms": dense_ms, "sparse_ms": sparse_ms, "speedup": dense_ms / sparse_ms, "cpu_speedup": cpu}


def run(engine: Any, controls: Controls, sources: list[Any], name: str, lpips: Distance | None = None) -> Row:
    """One scenario. sources: for each chunk (true pictures, seen pictures), or None."""
    state, dense, sparse = engine.open(controls.seed), Clock(), Clock()
    plain = replace(controls, regions=0.0)
    active: list[float] = []
    found: dict[str, list[float | None]] = {
        key: [] for key in ("psnr", "ssim", "gmsd", "lpips", "static", "floor", "seam", "seam_0")
    }
    found |= {key: [] for key in ("pop", "pop_0", "flow", "flow_0")}
    masks: list[tuple[np.ndarray, np.ndarray]] = []
    wanted: list[tuple[np.ndarray, np.ndarray]] = []
    shown: np.ndarray | None = None
    stood_on: np.ndarray | None = None
    for index, source in enumerate(sources):
        true, seen = source if source is not None else (None, None)
        twin, floor = deepcopy(state), deepcopy(state)
        beside = [deepcopy(state) for _ in range(1, DRAWS)] if true is None and index >= 3 else []
        chunk: Chunk = sparse.time(lambda seen=seen: engine.step(state, controls, seen))
        other: Chunk = dense.time(lambda twin=twin, seen=seen: engine.step(twin, plain, seen))
        held_THWC = None if index < 3 else held_pictures(engine, floor)
        if chunk.active_HW is None and index < 3:  # nothing can be held yet
            del sparse.wall_ms[-1], sparse.cpu_ms[-1], dense.wall_ms[-1], dense.cpu_ms[-1]
        every = np.ones(engine.config.tiles, bool)
        mask = every if chunk.active_HW is None else chunk.active_HW
        if shown is not None and held_THWC is not None:
            active.append(float(mask.mean()))
            again: Chunk | None = None
            if chunk.active_HW is not None:
                floor.seed += OTHER_SEED
                again = engine.step(floor, replace(plain, seed=floor.seed), seen)
                compare(found, chunk, other, again, shown, held_THWC, lpips)
            # What the held tiles stand on against what is there now. For text, against several dense draws of the
            # chunk: what changes no more than they differ among themselves is texture drawn afresh, and no motion.
            if true is not None and stood_on is not None:
                truth = figures.true_change(true, stood_on)
            else:
                draws = [other.frames_THWC]
                for number, each in enumerate(beside, 1):
                    each.seed += number * OTHER_SEED
                    draws.append(engine.step(each, replace(plain, seed=each.seed)).frames_THWC)
                truth = figures.true_motion(draws, held_THWC)
            masks.append((truth, mask))
            asked = mask if chunk.refreshed_HW is None else mask & ~chunk.refreshed_HW
            wanted.append((truth, asked))
        if true is not None:
            stood_on = true[-1].copy() if stood_on is None else stood_on
            pixels = figures.over_pixels(mask)
            stood_on[pixels] = true[-1][pixels]
        shown = chunk.frames_THWC[-1]
    recall, _ = figures.recall_and_precision(masks)
    _, precision = figures.recall_and_precision(wanted)
    of = {key: figures.mean(values) for key, values in found.items()}
    return {
        "scenario": name,
        "active_fraction": figures.mean([*active]),
        **paired(dense, sparse),
        "psnr_active": of["psnr"],
        "ssim_active": of["ssim"],
        "gmsd_active": of["gmsd"],
        "lpips_active": of["lpips"],
        "static_error_ratio": figures.ratio(of["static"], of["floor"]),
        "seam": figures.ratio(of["seam"], of["seam_0"]),
        "pop": figures.ratio(of["pop"], of["pop_0"]),
        "flow_ratio": figures.ratio(of["flow"], of["flow_0"]),
        "mask_recall": recall,
        "mask_precision": precision,
    }


def compare(
    found: dict[str, list[float | None]],
    ours: Chunk,
    dense: Chunk,
    again: Chunk,
    shown_HWC: np.ndarray,
    held_THWC: np.ndarray,
    lpips: Distance | None,
) -> None:
    """ours and dense from one state with the same noise, again with other noise; what was shown before, and held."""
    assert ours.active_HW is not None
    mask = figures.over_pixels(ours.active_HW)
    moved = ours.active_HW if ours.refreshed_HW is None else ours.active_HW & ~ours.refreshed_HW
    a, b, c = ours.frames_THWC, dense.frames_THWC, again.frames_THWC
    area = figures.over_pixels(moved)
    found["psnr"].append(figures.psnr(a, b, area))
    found["ssim"].append(figures.ssim(a, b, area))
    found["gmsd"].append(figures.gmsd(a, b, area))
    found["lpips"].append(perceived(lpips, a, b, area))
    found["static"].append(figures.rms(a, b, ~mask))
    # A held tile shows the last of its latent frame's pictures, and a decoder draws each of them a little differently.
    chance, flicker = figures.rms(c, b, ~mask), figures.rms(held_THWC, held_THWC[-1:], ~mask)
    found["floor"].append(None if chance is None or flicker is None else float(np.hypot(chance, flicker)))
    found["seam"].append(figures.seam(a, moved))
    found["seam_0"].append(figures.seam(b, moved))
    found["pop"].append(figures.pop(shown_HWC, a))
    found["pop_0"].append(figures.pop(shown_HWC, b))
    found["flow"].append(figures.flow_energy(a, area))
    found["flow_0"].append(figures.flow_energy(b, area))
