"""A source that moves fast gets less noise: the published rule, chunk by chunk, alone and in the engine."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pipeline.chunk import Controls
from pipeline.codec import pixels_to_frames
from pipeline.config import ModelConfig, load_config
from pipeline.engine import Engine
from pipeline.errors import PipelineError
from pipeline.models import FAMILIES
from pipeline.noise_controller import NoiseController, motion
from pipeline.weights import pocket_folder

AWARE = Controls("red ball", strength=0.6, motion_aware=True)
CHUNK = 8


def steps(*levels: float) -> Tensor:
    """Pictures of one grey each, (T, 3, 8, 8)."""
    return torch.tensor(levels)[:, None, None, None].expand(-1, 3, 8, 8)


def still(config: ModelConfig, level: int = 90) -> np.ndarray:
    return np.full((config.frames_per_chunk, config.height, config.width, 3), level, np.uint8)


def flashing(config: ModelConfig) -> np.ndarray:
    """A chunk of pictures that are black and white by turns."""
    pictures = still(config, 0)
    pictures[1::2] = 255
    return pictures


def test_motion_is_the_largest_step_as_a_share_of_the_published_fifth() -> None:
    assert motion(steps(0.3, 0.3, 0.3)) == 0
    assert motion(steps(0.0, 0.02, 0.0, 0.1, 0.1)) == pytest.approx(0.5)
    assert motion(steps(-1.0, 1.0)) == 1
    half = steps(0.0, 0.1).clone()
    half[1, :, :, 4:] = 0  # the half of the pixels moves: by the root mean square, not by the mean
    assert motion(half) == pytest.approx(0.5 * 0.5**0.5)


def test_full_motion_takes_a_tenth_and_what_was_before_weighs_a_tenth() -> None:
    controller = NoiseController()
    fast, calm = steps(*[-1.0, 1.0] * 4), steps(*[1.0] * 8)
    assert [controller.see(fast) for _ in range(3)] == pytest.approx([0.09, 0.099, 0.0999])
    assert [controller.see(calm) for _ in range(2)] == pytest.approx([0.00999, 0.000999])


def test_the_step_from_the_chunk_before_counts() -> None:
    controller = NoiseController()
    assert controller.see(steps(*[0.0] * 8)) == 0
    assert controller.see(steps(*[0.1] * 8)) == pytest.approx(0.9 * 0.1 * 0.5)


@given(levels=st.lists(st.floats(-1, 1), min_size=CHUNK, max_size=5 * CHUNK), asked=st.floats(0, 1))
def test_a_stream_is_smoothed_as_the_published_rule_says_of_the_whole_clip_and_stays_in_range(
    levels: list[float], asked: float
) -> None:
    clip = torch.tensor(levels[: len(levels) // CHUNK * CHUNK], dtype=torch.float64)
    controller, scale = NoiseController(), asked
    for start in range(0, len(clip), CHUNK):
        before = clip[max(0, start - 1) : start + CHUNK - 1] if start else torch.cat((clip[:1], clip[: CHUNK - 1]))
        distance = min(1.0, float((clip[start : start + CHUNK] - before).abs().max()) / 0.2)
        scale = 0.9 * (asked - 0.1 * distance) + 0.1 * scale
        less = controller.see(clip[start : start + CHUNK, None, None, None].float())
        assert asked - less == pytest.approx(scale, abs=1e-5)
        assert 0 <= less <= 0.1


def test_a_still_source_is_drawn_with_the_strength_that_was_asked_for(engine: Engine, config: ModelConfig) -> None:
    ours, plain = engine.open(7), engine.open(7)
    for _ in range(3):
        one = engine.step(ours, AWARE, still(config))
        other = engine.step(plain, replace(AWARE, motion_aware=False), still(config))
        assert np.array_equal(one.latents_TCHW, other.latents_TCHW)


def test_fast_motion_is_drawn_as_a_lower_strength_is(engine: Engine, config: ModelConfig) -> None:
    """The level below, 0.5 by this schedule, is where it was, so that the two schedules are the same."""
    ours, theirs = engine.open(7), engine.open(7)
    for less in (0.09, 0.099, 0.0999):
        one = engine.step(ours, AWARE, flashing(config))
        assert ours.noise.less == pytest.approx(less)
        lower = Controls("red ball", strength=0.6 - ours.noise.less)
        assert np.array_equal(one.latents_TCHW, engine.step(theirs, lower, flashing(config)).latents_TCHW)


def test_a_chunk_streamed_is_as_much_lower_as_its_part_of_the_whole_clip_says(
    engine: Engine, config: ModelConfig
) -> None:
    clip = np.random.default_rng(0).integers(80, 100, (4 * CHUNK, config.height, config.width, 3), dtype=np.uint8)
    frames, less, state = pixels_to_frames(torch.from_numpy(clip)), 0.0, engine.open(7)
    for index, part in enumerate(np.split(clip, 4)):
        engine.step(state, AWARE, part)
        less = 0.09 * motion(frames[max(0, CHUNK * index - 1) : CHUNK * (index + 1)]) + 0.1 * less
        assert state.noise.less == pytest.approx(less)
        assert 0.01 < less < 0.09


def test_a_weak_strength_never_falls_below_the_source_itself(engine: Engine, config: ModelConfig) -> None:
    weak, none = (engine.step(engine.open(7), replace(AWARE, strength=at), flashing(config)) for at in (0.05, 0.0))
    assert np.array_equal(weak.latents_TCHW, none.latents_TCHW)


def test_a_strength_that_is_changed_holds_at_once(engine: Engine, config: ModelConfig) -> None:
    """And is not smoothed from the one before: lowered, it would lie above what is asked for."""
    ours, plain = engine.open(7), engine.open(7)
    for strength in (0.9, 0.3):
        one = engine.step(ours, replace(AWARE, strength=strength), still(config))
        other = engine.step(plain, Controls("red ball", strength=strength), still(config))
        assert np.array_equal(one.latents_TCHW, other.latents_TCHW)


@pytest.mark.parametrize("how", ["reset", "seed", "no source", "switched off"])
def test_what_moved_is_forgotten_with_the_stream_with_the_source_and_with_the_switch(
    engine: Engine, config: ModelConfig, how: str
) -> None:
    state = engine.open(7)
    for _ in range(2):
        engine.step(state, AWARE, flashing(config))
    assert state.noise.less > 0.05
    controls = AWARE
    if how == "reset":
        engine.reset(state, 7)
    elif how == "seed":
        controls = replace(AWARE, seed=8)
    elif how == "no source":
        engine.step(state, AWARE)
    else:
        engine.step(state, replace(AWARE, motion_aware=False), still(config, 255))
    engine.step(state, controls, still(config, 0))
    assert state.noise.less == 0


def test_a_model_whose_recipe_has_none_is_as_it_was_and_one_whose_recipe_has_it_begins_with_it(
    engine: Engine, config: ModelConfig
) -> None:
    recipe = Engine(replace(config, motion_aware=True), engine.codec, engine.text, engine.student)
    unsaid, off = replace(AWARE, motion_aware=None), replace(AWARE, motion_aware=False)

    def drawn(which: Engine, controls: Controls) -> bytes:
        return which.step(which.open(7), controls, flashing(config)).latents_TCHW.tobytes()

    assert drawn(engine, unsaid) == drawn(engine, off) == drawn(recipe, off)
    assert drawn(engine, AWARE) == drawn(recipe, unsaid) == drawn(recipe, AWARE)
    assert drawn(engine, AWARE) != drawn(engine, off)


def test_the_recipe_of_streamdiffusion_v2_has_it_and_no_other() -> None:
    aware = [row.name for row in FAMILIES if row.layout == "wan" and row.config(320, 192).motion_aware]
    assert aware == ["streamdiffusion-v2", "streamdiffusion-v2-14b"]
    assert not load_config(pocket_folder() / "config.json").motion_aware


@pytest.mark.parametrize("value", [1, 0, "yes", 0.5])
def test_anything_but_true_false_and_none_is_refused_before_anything_changes(engine: Engine, value: object) -> None:
    state = engine.open(7)
    with pytest.raises(PipelineError) as refused:
        engine.step(state, replace(AWARE, motion_aware=value))  # type: ignore[arg-type]
    assert refused.value.code == "motion_aware_invalid"
    assert state.index == 0
