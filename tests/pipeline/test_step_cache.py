"""Passes that are left out: none at threshold 0, the middle ones of many at a high one."""

import numpy as np
import pytest
import torch

from pipeline.attention import CachedAttention
from pipeline.chunk import Controls
from pipeline.engine import Engine
from pipeline.kv_cache import KVCache
from pipeline.sampler import with_steps
from pipeline.step_cache import StepCache
from pipeline.training.guided import GuidedTeacher


def passes(engine: Engine, threshold: float, count: int = 8) -> tuple[list[torch.Tensor], StepCache]:
    """Those of one chunk whose latents hardly change from pass to pass."""
    config, student = engine.config, engine.student
    cached = StepCache(student, threshold, count)
    attend = CachedAttention(KVCache.of(config), student, config.grid, config.chunk)
    text = student.text_kv(engine.text(engine.text.tokenize(["red ball"])))
    size = (1, config.chunk, config.codec.latent_channels, *config.latent_size)
    noise = torch.randn(size, generator=torch.Generator().manual_seed(1))
    levels = [900.0 - 10 * step for step in range(count)]
    with torch.inference_mode():
        return [
            cached(noise * (1 - step / 100), torch.full((1, 1), t), text, attend) for step, t in enumerate(levels)
        ], (cached)


def test_with_threshold_0_a_pass_is_the_uncached_one_bit_for_bit(engine: Engine) -> None:
    config, student = engine.config, engine.student
    made, cached = passes(engine, 0.0)
    attend = CachedAttention(KVCache.of(config), student, config.grid, config.chunk)
    text = student.text_kv(engine.text(engine.text.tokenize(["red ball"])))
    noise = torch.randn(
        (1, config.chunk, config.codec.latent_channels, *config.latent_size), generator=torch.Generator().manual_seed(1)
    )
    with torch.inference_mode():
        for step, out in enumerate(made):
            level = torch.full((1, 1), 900.0 - 10 * step)
            assert torch.equal(out, student(noise * (1 - step / 100), level, text, attend))
    assert cached.skipped == 0


def test_first_and_last_pass_are_always_computed(engine: Engine) -> None:
    exact, _ = passes(engine, 0.0)
    made, cached = passes(engine, 1e9)
    assert cached.skipped == 6
    assert torch.equal(made[0], exact[0])
    assert torch.equal(made[-1], exact[-1])
    assert not torch.equal(made[3], exact[3])


def test_changes_add_up_until_a_pass_is_computed(engine: Engine) -> None:
    counts = [passes(engine, threshold)[1].skipped for threshold in (1e-6, 0.2, 1e9)]
    assert counts == sorted(counts)
    assert counts[0] == 0 < counts[1] < counts[2]


@pytest.mark.parametrize("teacher", [False, True], ids=["student", "teacher"])
def test_a_stream_with_a_step_cache_leaves_out_passes_and_still_repeats_with_its_seed(
    engine: Engine, teacher: bool
) -> None:
    def made(threshold: float) -> np.ndarray:
        parts = (engine.codec, engine.text, engine.student)
        model = (
            GuidedTeacher(engine.config, *parts, steps=8, step_cache=threshold)
            if teacher
            else Engine(with_steps(engine.config, 8), *parts, step_cache=threshold)
        )
        state = model.open(3)
        return np.concatenate([model.step(state, Controls("red ball", 3)).latents_TCHW for _ in range(2)])

    assert np.array_equal(made(1e-9), made(0.0))
    assert np.array_equal(made(5.0), made(5.0))
    assert not np.array_equal(made(5.0), made(0.0))
