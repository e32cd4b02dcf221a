"""What active tokens may see of held ones, option by option: the same scenarios, the same noise, one setting changed.

Each option's stream goes on on its own past, as it would live; its dense twins start from there. Knows no other option.
"""

from dataclasses import replace
from typing import Any, get_args, get_type_hints

from app.perceptual import Distance
from app.region_run import Shot, told, watch
from app.region_scenes import FOLLOWED, TEXTS, scenes, shoot
from app.region_speed import TEXT, WEBCAM, Row
from pipeline.chunk import Controls
from pipeline.config import RegionConfig

OPTIONS: tuple[str, ...] = get_args(get_type_hints(RegionConfig)["carry"])
SEEN, ASKED = ("speaker", "exposure"), TEXTS[:2]


def carries(engine: Any, size: str, dial: float, chunks: int, lpips: Distance | None = None) -> list[Row]:
    """A row for each scene or text and each option of `RegionConfig.carry`."""
    made = scenes(engine.config.width, engine.config.height)
    runs: list[tuple[str, str, Controls, list[Shot]]] = []
    for name in SEEN:
        shots: list[Shot] = [shoot(made[name], index) for index in range(chunks)]
        runs.append((WEBCAM, name, Controls(FOLLOWED, regions=dial), shots))
    for text in ASKED:
        runs.append((TEXT, text, Controls(text, regions=dial), [(None, None)] * chunks))
    rows = []
    for mode, name, controls, shots in runs:
        for carry in OPTIONS:
            seen = watch(with_carry(engine, carry), controls, shots, lpips)
            rows.append({"size": size, "mode": mode, "scenario": name, "mask": "own", "carry": carry} | told(seen))
    return rows


def with_carry(engine: Any, carry: str) -> Any:
    """The same weights under another setting."""
    from pipeline.engine import Engine

    config = replace(engine.config, regions=RegionConfig(carry))  # type: ignore[arg-type]
    return Engine(config, engine.codec, engine.text, engine.student, device=str(engine.device))
