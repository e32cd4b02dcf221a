"""Each figure of region caching tells a flaw from its absence."""

import numpy as np
import pytest

from app import region_figures as figures
from app.region_scenes import scenes, shoot

MASK = np.array([[0, 0, 0], [0, 1, 0]], bool)
AREA = figures.over_pixels(MASK)


def pictures(seed: int = 0) -> np.ndarray:
    smooth = np.linspace(40, 200, 96)[None, None, :, None] + np.zeros((8, 64, 96, 3))
    return (smooth + np.random.default_rng(seed).normal(0, 3, smooth.shape)).astype(np.uint8)


def brighter(frames: np.ndarray, area_HW: np.ndarray, by: int) -> np.ndarray:
    changed = frames.copy()
    changed[:, area_HW] += np.uint8(by)
    return changed


def test_likeness_is_read_in_the_area_alone() -> None:
    frames = pictures()
    assert figures.psnr(frames, brighter(frames, ~AREA, 20), AREA) == 60
    assert figures.psnr(frames, brighter(frames, AREA, 20), AREA) == pytest.approx(20 * np.log10(255 / 20))
    assert figures.ssim(frames, frames, AREA) == pytest.approx(1)
    assert figures.ssim(frames, pictures(1), AREA) < 0.95  # type: ignore[operator]
    assert figures.psnr(frames, frames, np.zeros_like(AREA)) is None


def test_the_inside_of_an_area_ends_before_its_border() -> None:
    inner = figures.inside(AREA)
    assert inner[40:64, 40:56].all()
    assert inner.sum() == (32 - 16) * (32 - 8)  # the picture's own edge is no border


def test_a_seam_is_a_step_at_the_masks_border() -> None:
    frames = pictures()
    clean, seamed = figures.seam(frames, MASK), figures.seam(brighter(frames, AREA, 12), MASK)
    assert clean == pytest.approx(1, abs=0.1)
    assert seamed is not None and seamed > 2
    assert figures.seam(frames, np.zeros_like(MASK)) is None


def test_a_pop_is_a_step_into_the_chunk_of_the_area_alone() -> None:
    frames, every = pictures(), np.ones_like(AREA)
    popped = brighter(frames, AREA, 30)
    assert figures.pop(frames[0], frames, every) == 0
    assert figures.pop(frames[0], popped, AREA) == 30
    assert figures.pop(frames[0], popped, ~AREA) == 0
    assert figures.pop(frames[0], popped, every) == pytest.approx(30 * AREA.mean())
    assert figures.pop(frames[0], popped, np.zeros_like(AREA)) is None


def test_a_ghost_is_the_share_of_what_left_that_is_still_seen() -> None:
    empty, every = pictures(), np.ones_like(AREA)
    before = brighter(empty, AREA, 60)[-1]
    assert figures.ghost(empty, empty, empty, before, every) == 0
    assert figures.ghost(brighter(empty, AREA, 60), empty, empty, before, every) == pytest.approx(1)
    assert figures.ghost(brighter(empty, AREA, 15), empty, empty, before, every) == pytest.approx(0.25)


def test_no_ghost_is_seen_in_chance_or_in_what_came_elsewhere() -> None:
    empty, every = pictures(), np.ones_like(AREA)
    before = brighter(pictures(3), AREA, 12)[-1]  # hardly more than the noise of the draws
    assert figures.ghost(pictures(1), empty, pictures(2), before, AREA) == pytest.approx(0, abs=0.03)
    assert figures.ghost(before[None], empty, pictures(2), before, AREA) == pytest.approx(1, abs=0.1)
    thing = brighter(empty, AREA, 60)
    assert figures.ghost(brighter(empty, ~AREA, 60), empty, empty, thing[-1], every) == 0
    assert figures.ghost(thing, empty, empty, thing[-1], ~AREA) is None
    assert figures.ghost(empty, empty, empty, empty[-1], every) is None


def test_energy_of_motion_counts_what_moves_in_the_area() -> None:
    still = np.repeat(pictures()[:1], 8, 0)
    moving = still.copy()
    moving[::2, AREA] += 10
    assert figures.flow_energy(still, AREA) == 0
    assert figures.flow_energy(moving, AREA) == 100
    assert figures.flow_energy(moving, ~AREA) == 0


def test_a_tile_has_changed_once_a_person_could_see_it() -> None:
    frames = np.repeat(pictures()[:1], 8, 0)
    assert not figures.true_change(brighter(frames, AREA, 5), frames[0]).any()
    changed = frames.copy()
    changed[3:5, 40:44, 40:44] += 30
    assert np.array_equal(figures.true_change(changed, frames[0]), MASK)


def test_motion_is_change_that_fresh_draws_of_the_chunk_agree_on() -> None:
    draws = [pictures(seed) for seed in range(4)]
    assert not figures.true_motion(draws, pictures(9)[-1:]).any()
    assert np.array_equal(figures.true_motion([brighter(draw, AREA, 40) for draw in draws], pictures(9)[-1:]), MASK)


def test_what_a_decoder_shows_differently_from_picture_to_picture_has_not_moved() -> None:
    """Held against the picture in its own place, not against the last."""
    still = pictures(9)[-1:].repeat(4, 0)
    still[::2, AREA] += 40
    draws = [np.tile(still, (2, 1, 1, 1))] * 4
    assert not figures.true_motion(draws, still).any()
    assert np.array_equal(figures.true_motion(draws, still[-1:]), MASK)


def test_a_place_that_every_draw_shows_differently_has_not_moved() -> None:
    draws = [brighter(pictures(seed), AREA, 40 * (seed % 2)) for seed in range(4)]
    assert figures.true_change(draws[1], pictures(9)[-1:])[1, 1]
    assert not figures.true_motion(draws, pictures(9)[-1:]).any()


def test_gradient_similarity_minds_outlines_and_no_brightness() -> None:
    frames = np.random.default_rng(0).integers(60, 160, (2, 8, 12, 3)).repeat(8, 1).repeat(8, 2).astype(np.uint8)
    every = np.ones(frames.shape[1:3], bool)
    soft = np.stack([figures.cv2.GaussianBlur(frame, (9, 9), 3) for frame in frames])
    softer = np.stack([figures.cv2.GaussianBlur(frame, (21, 21), 7) for frame in frames])
    found = [figures.gmsd(frames, other, every) for other in (frames, frames + np.uint8(20), soft, softer)]
    assert found[0] == 0
    assert found[1] == pytest.approx(0, abs=1e-6)
    assert 0.02 < found[2] < found[3]  # type: ignore[operator]
    assert figures.gmsd(frames, soft, every) == pytest.approx(figures.gmsd(soft, frames, every))
    assert figures.gmsd(frames, soft, ~every) is None


def test_recall_and_precision_count_tiles_over_all_chunks() -> None:
    every = np.ones_like(MASK)
    assert figures.recall_and_precision([(MASK, every)]) == (1, 1 / 6)
    assert figures.recall_and_precision([(every, MASK), (MASK, MASK)]) == (2 / 7, 1)
    assert figures.recall_and_precision([(~every, ~every)]) == (None, None)


@pytest.mark.parametrize("name", list(scenes(64, 64)))
def test_a_scene_is_the_same_each_time_and_moves_as_it_should(name: str) -> None:
    scene = scenes(160, 96)[name]
    true, seen = shoot(scene, 9)
    assert np.array_equal(seen, shoot(scene, 9)[1])
    assert true.shape == (8, 96, 160, 3)
    first = shoot(scene, 3)[0]
    assert np.array_equal(true[0], first[0]) == name.startswith("noise")


def test_the_visitor_rests_for_twenty_seconds_and_is_gone_before_the_end() -> None:
    scene = scenes(160, 96)["visitor"]
    assert scene.chunks is not None
    empty, resting, leaving = shoot(scene, 0)[0], scene.parts["resting"], scene.parts["leaving"]
    still = shoot(scene, resting[0])[0]
    assert len(resting) >= 39
    assert all(np.array_equal(shoot(scene, index)[0], still) for index in (resting[1], resting[-1]))
    assert not np.array_equal(still, empty)
    assert not np.array_equal(shoot(scene, leaving[0])[0], still)
    assert np.array_equal(shoot(scene, scene.chunks - 1)[0], empty)
    assert leaving[-1] == scene.chunks - 1
