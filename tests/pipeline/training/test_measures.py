"""Measures give the numbers that a person would work out by hand, and count only what was asked for."""

from dataclasses import replace

import numpy as np
import pytest

from pipeline.training.captions import caption
from pipeline.training.measures import (
    agreement,
    background,
    background_noise,
    frechet_distance,
    meant,
    measure_motion,
    picture_change,
    psnr_db,
    score,
    still_share,
    unrest,
)
from pipeline.training.world import MOTIONS, SPEEDS, Scene, render, sample_scene, track

SCENE = Scene("ball", "red", "bounces", "slowly", "park", "pencil sketch", None, 11)
SIZE = (320, 192)
TIMES_S = np.arange(8) / 4


def path(scene: Scene, times_s: np.ndarray) -> np.ndarray:
    return track(scene, times_s, *SIZE) / SIZE


def test_one_level_off_is_48_db_and_equal_pictures_are_beyond_measure() -> None:
    real = np.full((2, 4, 4, 3), 100, np.uint8)
    assert psnr_db(real + 1, real) == pytest.approx(48.13, abs=0.01)
    assert psnr_db(real - 1, real) == pytest.approx(48.13, abs=0.01)
    assert psnr_db(real, real) == float("inf")


def test_the_distance_of_features_follows_from_means_and_spreads() -> None:
    features = np.random.default_rng(1).standard_normal((60, 5)) @ np.diag([1, 2, 3, 0.1, 0])
    features -= features.mean(0)
    spread = np.trace(np.cov(features, rowvar=False))
    assert frechet_distance(features, features[::-1]) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(features, features + np.array([3, 0, 0, 4, 0])) == pytest.approx(25)
    assert frechet_distance(features, 2 * features) == pytest.approx(spread, rel=1e-5)
    assert frechet_distance(2 * features, features) == pytest.approx(spread, rel=1e-5)


def test_what_a_caption_leaves_unsaid_is_not_asked_for() -> None:
    assert meant(SCENE).keys() == {"subject", "colour", "motion", "speed", "place", "style"}
    assert meant(SCENE, "pencil sketch: a red ball hopping gently in a green park") == meant(SCENE)
    assert meant(SCENE, "there is a red ball").keys() == {"subject", "colour"}
    assert meant(SCENE, "A red ball, in the park!").keys() == {"subject", "colour", "place"}
    assert "speed" not in meant(replace(SCENE, motion="stands still", speed=""))
    rng = np.random.default_rng(2)
    scenes = [sample_scene(rng) for _ in range(600)]
    asked = [meant(scene, caption(scene, rng)) for scene in scenes]
    assert all(words.items() <= meant(scene).items() for words, scene in zip(asked, scenes, strict=True))
    for name in ("motion", "place"):
        assert 0.89 < np.mean([name in words for words in asked]) < 0.97


def test_agreement_counts_each_attribute_over_the_clips_that_ask_for_it() -> None:
    read = [{"subject": "ball", "place": "park"}, {"subject": "box", "place": "beach"}]
    asked = [{"subject": "ball", "place": "park"}, {"subject": "star"}]
    agreed = agreement(read, asked)
    assert agreed == {"subject": 0.5, "place": 1.0}
    assert score(agreed, ("subject", "place")) == 0.75


@pytest.mark.parametrize("phase_known", [True, False])
def test_a_true_path_has_no_error_at_any_time_even_round_the_edge(phase_known: bool) -> None:
    scenes = [replace(SCENE, motion=motion, speed=speed) for motion in MOTIONS for speed in SPEEDS]
    times = [start_s + TIMES_S for start_s in np.linspace(0, 9, len(scenes))]
    paths = [path(scene, at_s) for scene, at_s in zip(scenes, times, strict=True)]
    motion = measure_motion(paths, scenes, times, phase_known=phase_known)
    assert motion.median_error < 0.01
    assert np.nanmax(motion.error) < 0.1
    assert np.isnan(motion.error).sum() == len(SPEEDS)
    assert (motion.expected[np.isnan(motion.error)] == 0).all()
    assert motion.still_share == 0


def test_speed_is_in_pixels_a_second_and_velocity_has_a_sign() -> None:
    scene = replace(SCENE, motion="moves right", speed="quickly")
    true = path(scene, TIMES_S)
    slow, back = path(replace(scene, speed="slowly"), TIMES_S), path(replace(scene, motion="moves left"), TIMES_S)
    frozen = np.repeat(true[:1], 8, axis=0)
    trembling = true + np.random.default_rng(3).normal(0, 1, (8, 2)) / SIZE
    paths = [true, slow, back, frozen, trembling]
    motion = measure_motion(paths, [scene] * 5, [TIMES_S] * 5)
    assert motion.speed[:4] == pytest.approx([128, 32, 128, 0], rel=0.05)
    assert motion.error[:4] == pytest.approx([0, 0.75, 2, 1], abs=1e-6)
    assert motion.error[4] < 0.05
    assert motion.still_share == 0.2


def test_a_bounce_out_of_step_is_forgiven_only_where_the_phase_is_not_known() -> None:
    late = path(SCENE, TIMES_S + 0.9)
    assert measure_motion([late], [SCENE], [TIMES_S]).median_error > 0.2
    assert measure_motion([late], [SCENE], [TIMES_S], phase_known=False).median_error < 0.05
    frozen = np.repeat(late[:1], 8, axis=0)
    assert measure_motion([frozen], [SCENE], [TIMES_S], phase_known=False).median_error == 1


def test_a_frozen_picture_stands_still_whatever_a_probe_makes_of_it() -> None:
    real = render(SCENE, TIMES_S)[None]
    frozen = np.repeat(real[:, :1], 8, axis=1)
    expected = picture_change(real)
    assert expected > 0.5
    assert still_share(picture_change(frozen), expected) == 1
    assert still_share(expected, expected) == 0
    assert np.isnan(still_share([1.0], [0.0]))


def test_the_background_is_what_the_mover_never_covers() -> None:
    for motion in ("bounces", "sways", "moves right"):
        scene = replace(SCENE, motion=motion, style="neon")
        clip = render(scene, TIMES_S)
        away = background(path(scene, TIMES_S), 192, 320)
        assert away.mean() > 0.05
        assert unrest(clip, away) == 0
        assert unrest(clip, ~away) > 1
    at_edge = background([(0.99, 0.5)], 192, 320)
    assert not at_edge[96, 5]
    assert at_edge[96, 160]


def test_background_noise_is_set_against_the_codecs_own() -> None:
    rng = np.random.default_rng(4)
    real = render(SCENE, TIMES_S).astype(float)
    away = background(path(SCENE, TIMES_S), 192, 320)
    made, coded = (real + rng.normal(0, deviation, real.shape) for deviation in (3, 2))
    noise = background_noise(made, coded, away)
    assert (noise.made, noise.codec) == pytest.approx((3 * (7 / 8) ** 0.5, 2 * (7 / 8) ** 0.5), rel=0.02)
    assert noise.ratio == pytest.approx(1.5, rel=0.02)
    assert background_noise(real, real, away).ratio == 0
    assert np.isnan(background_noise(made, coded, np.zeros_like(away)).ratio)
