"""A strip shows what was seen, drawn densely and drawn sparsely, one chunk beside the next."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from app import region_strips
from app.region_scenes import scenes, shoot
from app.region_strips import SCENES, SHOWN, WIDTH, draw_strips, strip
from pipeline.chunk import Controls
from pipeline.engine import Engine
from tests.app.tiny import regions_engine

HIGH = WIDTH * 96 // 160 + 4


def test_a_row_for_each_kind_and_a_column_for_each_chunk() -> None:
    engine, scene = regions_engine(), scenes(160, 96)["speaker"]
    sources = [shoot(scene, index)[1] for index in range(3 + SHOWN)]
    followed = strip(engine, Controls("ball", regions=0.5), sources)
    assert followed.shape == (4 * HIGH, SHOWN * (WIDTH + 4), 3)
    seen = cv2.resize(sources[-1][-1], (WIDTH, HIGH - 4), interpolation=cv2.INTER_AREA)
    assert np.array_equal(followed[: HIGH - 4, -WIDTH - 4 : -4], seen)
    alone = strip(engine, Controls("ball", regions=0.5), [None] * 4)
    assert alone.shape == (3 * HIGH, 4 * (WIDTH + 4), 3)


def test_every_scene_and_text_has_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine: Engine = regions_engine()
    assert {scene for scene, _ in SCENES.values()} <= set(scenes(160, 96))
    monkeypatch.setattr(region_strips, "SCENES", {"visitor": ("visitor", 4)})
    monkeypatch.setattr(region_strips, "TEXTS", ("a red ball",))
    paths = draw_strips(engine, tmp_path / "strips", 0.5)
    assert [path.name for path in paths] == ["visitor.jpg", "text-1.jpg"]
    assert all(cv2.imread(str(path)) is not None for path in paths)
