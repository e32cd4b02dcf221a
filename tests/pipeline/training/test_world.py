"""The procedural world: pure pictures of plain words."""

import colorsys
from dataclasses import replace

import numpy as np
import pytest

from pipeline.training.captions import WORDS, caption, split
from pipeline.training.world import (
    COLOURS,
    MOTIONS,
    PLACES,
    SPEEDS,
    STYLES,
    SUBJECTS,
    Scene,
    mover_cells,
    render,
    sample_scene,
    track,
)

SCENE = Scene("ball", "red", "moves left", "", "park", "flat", None, 11)


def mover_area(scene: Scene, time_s: float) -> np.ndarray:
    """Pixels near the middle of the main mover."""
    frame = render(scene, np.array([time_s]))[0]
    x, y = np.rint(track(scene, np.array([time_s]))[0]).astype(int)
    return frame[max(y - 22, 0) : y + 22, max(x - 22, 0) : x + 22].reshape(-1, 3).astype(float)


@pytest.mark.parametrize("motion", MOTIONS)
def test_a_scene_gives_the_same_picture_at_a_time_whatever_else_is_asked_for(motion: str) -> None:
    scene = replace(sample_scene(np.random.default_rng(4)), motion=motion, second=("white", "star"))
    times = np.array([0.0, 1.3, 5.0, 7200.0])
    clip = render(scene, times)
    assert clip.dtype == np.uint8
    assert clip.shape == (4, 192, 320, 3)
    assert np.array_equal(clip, render(scene, times))
    for k, t in enumerate(times):
        assert np.array_equal(clip[k], render(scene, np.array([t]))[0])


def test_the_size_is_a_parameter() -> None:
    assert render(SCENE, np.array([0.0]), 160, 96).shape == (1, 96, 160, 3)


def test_another_colour_or_place_keeps_the_position() -> None:
    times = np.arange(20) / 16
    other = replace(SCENE, colour="blue", subject="fish", place="theatre", style="neon")
    assert np.array_equal(track(SCENE, times), track(other, times))
    free = replace(SCENE, free=True)
    assert not np.array_equal(track(free, times), track(replace(free, layout_seed=12), times))


@pytest.mark.parametrize("place", PLACES)
def test_the_backdrop_is_still_outside_the_movers_path(place: str) -> None:
    scene = replace(SCENE, place=place, motion="circles", style="neon")
    times = np.arange(0, 4, 0.4)
    clip, centres = render(scene, times), track(scene, times)
    y, x = np.mgrid[:192, :320]
    away = np.ones((192, 320), bool)
    for cx, cy in centres:
        away &= np.hypot(x - cx, y - cy) > 90
    assert away.mean() > 0.05
    assert (clip[:, away] == clip[:1, away]).all()
    assert (clip[0] != clip[5]).any()


def test_stands_still_stands_still() -> None:
    clip = render(replace(SCENE, motion="stands still"), np.array([0.0, 3.7]))
    assert np.array_equal(clip[0], clip[1])


def test_left_is_left_right_is_right_and_speed_is_speed() -> None:
    times = np.arange(10) / 16
    for motion, sign in (("moves left", -1), ("moves right", 1)):
        for speed, pace in (("slowly", 32), ("", 64), ("quickly", 128)):
            x = track(replace(SCENE, motion=motion, speed=speed), times)[:, 0]
            steps = (np.diff(x) + 160) % 320 - 160
            assert np.allclose(steps * 16, sign * pace)


def test_a_scene_on_the_grid_comes_back_to_the_same_poses_at_the_borders_of_chunks() -> None:
    for motion in MOTIONS:
        for speed in SPEEDS:
            scene = replace(SCENE, motion=motion, speed=speed)
            lap = next(n for n in range(1, 41) if np.allclose(track(scene, [0.5 * n]), track(scene, [0.0])))
            assert np.array_equal(render(scene, [0.3]), render(scene, [0.3 + 0.5 * lap * 240]))


def test_a_free_scene_starts_anywhere_at_any_size() -> None:
    starts = np.array([track(replace(SCENE, free=True, layout_seed=seed), [0.0])[0] for seed in range(60)])
    assert np.ptp(starts[:, 0]) > 150
    assert np.ptp(starts[:, 1]) > 30
    assert np.array_equal(track(replace(SCENE, layout_seed=3), [0.0]), track(SCENE, [0.0]))


def test_a_free_scene_that_is_called_slow_is_slower_than_any_that_is_not() -> None:
    def paces(speed: str) -> list[float]:
        free = replace(SCENE, free=True, motion="moves right", speed=speed)
        steps = [np.diff(track(replace(free, layout_seed=seed), [0.0, 0.1])[:, 0])[0] for seed in range(80)]
        return [float((step + 160) % 320 - 160) for step in steps]

    assert max(paces("slowly")) < min(paces(""))
    assert max(paces("")) < min(paces("quickly"))


def test_every_scene_opens_with_its_mover_near_the_middle() -> None:
    rng = np.random.default_rng(3)
    for _ in range(200):
        scene = sample_scene(rng)
        x, y = track(scene, np.array([0.0]))[0]
        reach = 70 if scene.motion == "circles" else 0  # a circle is around the middle
        assert abs(x - 160) < 40 + reach
        assert 80 < y < 130


def test_the_picture_moves_where_the_track_says() -> None:
    scene = replace(SCENE, place="dark room", style="flat", motion="bounces")
    for t in np.arange(0, 3, 0.37):
        frame = render(scene, np.array([t]))[0].astype(int)
        red = (frame[..., 0] > 190) & (frame[..., 1] < 80)
        y, x = np.nonzero(red)
        assert np.abs(np.array([x.mean(), y.mean()]) - track(scene, np.array([t]))[0]).max() < 8


@pytest.mark.parametrize("motion", MOTIONS)
def test_the_movers_cells_are_those_that_another_mover_would_change(motion: str) -> None:
    scene = replace(SCENE, motion=motion, place="dark room", style="flat", speed="quickly")
    for start_s in (0.0, 1.1, 2.3):
        times = start_s + np.arange(4) / 16
        other = render(replace(scene, colour="blue"), times).astype(int)
        changed = np.abs(render(scene, times) - other).max((0, 3)) > 40
        seen = changed.reshape(12, 16, 20, 16).mean((1, 3)) > 0.1
        cells = mover_cells(scene, times, 12, 20)
        assert (cells & seen).sum() > 0.97 * seen.sum()
        assert cells.sum() < 2.2 * seen.sum()


def test_going_round_an_edge_never_jumps() -> None:
    scene = replace(SCENE, place="dark room", motion="moves right", speed="quickly")
    clip = render(scene, np.arange(0, 2.1, 1 / 16)).astype(int)
    change = np.abs(np.diff(clip, axis=0)).mean(axis=(1, 2, 3))
    assert change.max() < 2.2 * change.min()


def test_every_colour_is_seen_as_itself_in_every_style() -> None:
    for style in STYLES:
        hues = {}
        for colour in COLOURS:
            pixels = mover_area(replace(SCENE, colour=colour, style=style, motion="stands still"), 0.0)
            hue, _, _ = colorsys.rgb_to_hsv(*(pixels.mean(axis=0) / 255))
            spread = np.median(pixels.max(axis=1) - pixels.min(axis=1))
            if colour == "white":
                assert spread < 25, (style, spread)
            else:
                assert spread > 60, (style, colour, spread)
                hues[colour] = hue
        order = ["red", "orange", "yellow", "green", "blue", "purple", "pink"]
        turned = [(hues[name] + 0.04) % 1 for name in order]
        assert (np.diff(turned) > 0.04).all(), (style, hues)


@pytest.mark.parametrize(
    ("field", "names"),
    [("subject", SUBJECTS), ("colour", COLOURS), ("place", PLACES), ("style", STYLES), ("motion", MOTIONS)],
)
def test_every_word_makes_a_different_picture(field: str, names: tuple[str, ...]) -> None:
    scenes = [replace(SCENE, **{field: name}) for name in names]
    pictures = [render(scene, np.array([0.0, 0.8])).astype(int) for scene in scenes]
    for i, one in enumerate(pictures):
        for other in pictures[:i]:
            assert (np.abs(one - other).max(axis=-1) > 24).mean() > 0.01


def test_the_audience_sits_before_the_mover() -> None:
    scene = replace(SCENE, place="theatre", motion="bounces", colour="white")
    dark = [(render(scene, np.array([t]))[0][186:].astype(int).sum(axis=-1) < 200).mean() for t in (0.0, 0.4, 0.8)]
    assert min(dark) > 0.4
    assert max(dark) - min(dark) < 0.02


def test_captions_name_colour_and_subject_in_known_words() -> None:
    rng = np.random.default_rng(5)
    said = set()
    for _ in range(3000):
        scene = sample_scene(rng)
        words = split(caption(scene, rng))
        said.update(words)
        assert 2 <= len(words) <= 24
        assert f"{scene.colour} {scene.subject}" in " ".join(words)
        if scene.second is not None:
            assert " ".join(scene.second) in " ".join(words)
    assert said == set(WORDS)
    assert list(WORDS) == sorted(set(WORDS))


def test_captions_vary_and_repeat_with_their_generator() -> None:
    said = [caption(SCENE, np.random.default_rng(k)) for k in range(60)]
    assert said == [caption(SCENE, np.random.default_rng(k)) for k in range(60)]
    assert len(set(said)) > 30


def test_sampling_covers_the_world() -> None:
    rng = np.random.default_rng(6)
    scenes = [sample_scene(rng) for _ in range(800)]
    for field, names in (("subject", SUBJECTS), ("colour", COLOURS), ("place", PLACES), ("speed", SPEEDS)):
        assert {getattr(scene, field) for scene in scenes} == set(names)
    assert 0.15 < np.mean([scene.second is not None for scene in scenes]) < 0.25
    assert all(scene.second[0] != scene.colour for scene in scenes if scene.second is not None)
