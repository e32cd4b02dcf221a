"""`stillstream bench --regions`: dense and sparse chunks side by side, from the same state and with the same noise.

Which runs there are, and the keys that their rows have. Knows no viewer.
"""

from pathlib import Path

from app.errors import DENSE_ONLY, AppError
from app.perceptual import find_lpips
from app.region_carry import carries
from app.region_run import BYTES, GAPS, MEANS, RATIOS, stretches, watch
from app.region_scenes import FOLLOWED, TEXTS, scenes, shoot
from app.region_speed import SHARES, SPEED, TEXT, WEBCAM, WIDE, Row, speeds, wide_engine
from pipeline.chunk import Controls
from pipeline.config import ModelConfig

# Named like scenarios: times against the share of tiles at both sizes, and what active tokens see of held ones.
SPEED_WIDE, CARRY = "speed-wide", "carry"
WIDE_CHUNKS = 2
TOLD = ("active_fraction", "speedup", "cpu_speedup", *MEANS, *RATIOS, "mask_recall", "mask_precision", BYTES)
READ = tuple(key for gap in GAPS for key in (gap, f"{gap}_error"))  # of free runs, by a probe
FREE, FREE_CHUNKS = "free run", 250
KEYS = ("size", "mode", "scenario", "mask", "carry", "dense_ms", "sparse_ms", *TOLD, *READ)


def measure_regions(
    model: Path | None,
    threads: int,
    dial: float,
    chunks: int,
    names: list[str],
    probe: Path | None = None,
    free: int = 2,
) -> list[Row]:
    """The speed of given masks first, then every scenario. names: what to run of these; none: all.

    probe: reads the `free` streams of a free run; None: the embedded one does. Raises AppError (`probe_unreadable`,
    `regions_unsupported`, `scenario_unknown`).
    """
    from app.probe import read_probe
    from app.region_free import free_run
    from app.region_given import GivenEngine
    from pipeline.engine import Engine
    from pipeline.training.probe import EMBEDDED

    reader = read_probe(probe or EMBEDDED) if free and (not names or FREE in names) else None
    lpips = find_lpips()
    engine = Engine.load(model, threads=threads)
    config = engine.config
    check_asked(config, names)
    size = f"{config.width}x{config.height}"
    rows: list[Row] = []
    if not names or SPEED in names:
        rows += speeds(engine, size, chunks, dial)
    if not names or SPEED_WIDE in names:
        rows += speeds(wide_engine(), WIDE, WIDE_CHUNKS, dial, SHARES)
    if not names or CARRY in names:
        rows += carries(engine, size, dial, chunks, lpips)
    for name, scene in scenes(config.width, config.height).items():
        if not names or name in names:
            shots = [shoot(scene, index) for index in range(scene.chunks or chunks)]
            controls = Controls(FOLLOWED, regions=dial)
            seen = watch(engine, controls, shots, lpips)
            found = stretches(name, seen, scene.parts)
            rows += [row | {"size": size, "mode": WEBCAM, "mask": "own"} for row in found]
            if found[0]["psnr_active"] is not None:  # else no tile was computed for having moved while others stood
                seen = watch(GivenEngine(engine), controls, shots, lpips, true_mask=True)
                found = stretches(name, seen, scene.parts)
                rows += [row | {"size": size, "mode": WEBCAM, "mask": "true"} for row in found]
    for name in TEXTS:
        if not names or name in names:
            seen = watch(engine, Controls(name, regions=dial), [(None, None)] * chunks, lpips)
            rows += [row | {"size": size, "mode": TEXT, "mask": "own"} for row in stretches(name, seen)]
    if reader is not None:
        for mode in (WEBCAM, TEXT):
            gaps = free_run(engine, reader, dial, FREE_CHUNKS, mode == WEBCAM, free)
            rows.append({"size": size, "mode": mode, "scenario": FREE} | gaps)
    return [{key: row.get(key) for key in KEYS} for row in rows]


def check_asked(config: ModelConfig, names: list[str]) -> None:
    """Raises AppError (`regions_unsupported`, `scenario_unknown`)."""
    if config.tiles is None:
        raise DENSE_ONLY
    known = (SPEED, SPEED_WIDE, CARRY, *scenes(config.width, config.height), *TEXTS, FREE)
    for name in names:
        if name not in known:
            told = ", ".join(f'"{each}"' if " " in each else each for each in known)
            raise AppError("scenario_unknown", f"There is no scenario {name!r}.", f"Choose of: {told}.")


def label(row: Row) -> str:
    """What a row is called in tables."""
    if row["scenario"] == SPEED:
        return f"{row['size']}, {row['mode']}"
    if row["scenario"] == FREE:
        return f"{FREE}, {row['mode']}"
    name = f"{row['carry']}: {row['scenario']}" if row["carry"] else str(row["scenario"])
    return f"{name} (true mask)" if row["mask"] == "true" else name
