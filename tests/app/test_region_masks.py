"""The motion mask alone over all drawn scenes: it names what changes and little else, and gives up where it must."""

from itertools import count

import numpy as np
import pytest

from app.region_masks import Followed, follow
from app.region_scenes import PICTURES, scenes, shoot
from pipeline.plan import SETTLE

SMALL, LARGE = (224, 160), (320, 192)  # small frames tell the same, but that the clock's hand hardly moves in them
STILL, PARTLY, WHOLLY = ("noise_2", "noise_5", "noise_10"), ("speaker", "clock", "exposure", "visitor"), ("pan", "rain")
AT_ONCE, HAPPENS = ("light", "cut"), 8  # and in which chunk
CHUNKS = {"speaker": range(8), "clock": range(7), "exposure": range(10)} | dict.fromkeys(AT_ONCE, range(5, 11))
DIALS = (0.1, 0.5, 1.0)

Shot = tuple[str, range, list[tuple[np.ndarray, np.ndarray]]]


@pytest.fixture(scope="module", params=[(name, seed) for name in scenes(64, 64) for seed in (0, 1)], ids=str)
def shot(request: pytest.FixtureRequest) -> Shot:
    """A scene's name and its chunks, rendered once for all dials."""
    name, seed = request.param
    scene = scenes(*(LARGE if name == "clock" else SMALL), seed)[name]
    chunks = CHUNKS.get(name, range(SETTLE + 3))
    if name == "visitor":  # to the end, however long the stay
        came = next(chunk for chunk in count() if not np.array_equal(scene.draw(PICTURES * chunk), scene.draw(0)))
        left = next(chunk for chunk in count(came) if np.array_equal(scene.draw(PICTURES * chunk), scene.draw(0)))
        chunks = range(came - SETTLE - 1, left + 2)
    return name, chunks, [shoot(scene, chunk, seed) for chunk in chunks]


@pytest.mark.parametrize("dial", DIALS)
def test_what_changes_is_named_with_little_else_and_all_tiles_where_all_change(shot: Shot, dial: float) -> None:
    name, chunks, sources = shot
    found = follow(sources, dial)
    recall, precision = found.recall_and_precision
    if name in STILL:
        assert recall is None  # there is nothing to find
        assert found.active_fraction <= 0.01
    else:
        assert recall is not None and recall >= 0.99
        assert precision is not None and precision >= 0.5
    assert [chunks[place] for place in found.dense] == when_dense(name, chunks)


def when_dense(name: str, chunks: range) -> list[int]:
    assert name in (*STILL, *PARTLY, *WHOLLY, *AT_ONCE), f"nobody said whether {name} is to be dense"
    return list(chunks[SETTLE:]) if name in WHOLLY else [HAPPENS] if name in AT_ONCE else []


def test_tiles_that_a_mask_leaves_out_stand_on_what_they_last_showed() -> None:
    """What is too weak to be asked for is missed in every chunk until it is computed, not in the first alone."""
    still = np.full((PICTURES, 64, 96, 3), 90, np.uint8)
    shaded = still.copy()
    shaded[:, 4:9, 4:9] += 9
    found: Followed = follow([(picture, picture) for picture in (still, still, still, shaded, shaded)], 1.0)
    assert [(int(true.sum()), int(said.sum())) for true, said in found.masks] == [(1, 0), (1, 0)]
    assert found.recall_and_precision == (0, None)
    assert found.active_fraction == 0
