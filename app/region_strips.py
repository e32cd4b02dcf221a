"""Strips in which a person sees dense chunks beside sparse ones: one column a chunk, one row a kind.

Like the figures, each dense chunk is made from the sparse stream's own state and with the same noise. Writes pictures,
and knows neither figures nor times.
"""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from app.region_run import FIRST
from app.region_scenes import FOLLOWED, TEXTS, scenes, shoot
from app.tint import tinted
from pipeline.chunk import Chunk, Controls

SHOWN = 5  # chunks of each
# By file: a scene, and the first chunk that is shown of it.
SCENES = {
    **{name: (name, FIRST) for name in ("speaker", "clock", "exposure", "visitor", "pan", "rain")},
    "noise": ("noise_10", FIRST),
    "visitor-leaves": ("visitor", 46),
    **{name: (name, 6) for name in ("light", "cut")},
}
WIDTH = 192  # of a picture, in pixels
QUALITY = 80


def draw_strips(engine: Any, folder: Path, dial: float) -> list[Path]:
    """One file for each scene and text; the text's own name is its number."""
    config = engine.config
    asked: dict[str, tuple[Controls, list[Any]]] = {}
    for name, (scene, first) in SCENES.items():
        drawn = scenes(config.width, config.height)[scene]
        pictures = [shoot(drawn, index)[1] for index in range(first + SHOWN)]
        asked[name] = Controls(FOLLOWED, regions=dial), pictures
    for number, text in enumerate(TEXTS, 1):
        asked[f"text-{number}"] = Controls(text, regions=dial), [None] * (FIRST + SHOWN)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, (controls, pictures) in asked.items():
        paths.append(folder / f"{name}.jpg")
        picture = cv2.cvtColor(strip(engine, controls, pictures), cv2.COLOR_RGB2BGR)
        cv2.imwrite(str(paths[-1]), picture, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
    return paths


def strip(engine: Any, controls: Controls, sources: list[Any]) -> np.ndarray:
    """The last picture of each of the last SHOWN chunks: of the source, where there is one; dense; sparse; and sparse
    with what was computed tinted."""
    state, columns = engine.open(controls.seed), []
    for index, source in enumerate(sources):
        twin = deepcopy(state)
        sparse: Chunk = engine.step(state, controls, source)
        if index >= len(sources) - SHOWN:
            dense: Chunk = engine.step(twin, replace(controls, regions=0.0), source)
            seen = [] if source is None else [source[-1]]
            rows = (*seen, dense.frames_THWC[-1], sparse.frames_THWC[-1], tinted(sparse)[-1])
            columns.append(np.concatenate([small(row) for row in rows]))
    return np.concatenate(columns, 1)


def small(picture_HWC: np.ndarray) -> np.ndarray:
    """With a white line to its right and below."""
    height = picture_HWC.shape[0] * WIDTH // picture_HWC.shape[1]
    shrunk = cv2.resize(picture_HWC, (WIDTH, height), interpolation=cv2.INTER_AREA)
    framed: np.ndarray = np.pad(shrunk, ((0, 4), (0, 4), (0, 0)), constant_values=255)
    return framed
