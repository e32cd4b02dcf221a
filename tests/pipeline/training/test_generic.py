"""Webcam-like pictures: the right shape, varied and repeatable."""

import numpy as np

from pipeline.training.generic import generic_clip


def test_clips_are_rgb_bytes_that_differ_from_one_another_and_repeat_with_their_seed() -> None:
    means = []
    for seed in range(24):
        clip = generic_clip(np.random.default_rng(seed), 4, 160, 96)
        assert clip.dtype == np.uint8
        assert clip.shape == (4, 96, 160, 3)
        assert clip.std() > 2
        means.append(clip.mean(axis=(0, 1, 2)))
        assert np.array_equal(clip, generic_clip(np.random.default_rng(seed), 4, 160, 96))
    assert np.std(means, axis=0).min() > 20


def test_most_clips_move_and_none_flickers() -> None:
    moved = []
    for seed in range(24):
        clip = generic_clip(np.random.default_rng(seed), 12, 160, 96).astype(int)
        steps = np.abs(np.diff(clip, axis=0)).mean(axis=(1, 2, 3))
        assert steps.max() < 25
        moved.append(np.abs(clip[-1] - clip[0]).mean() > 0.5)
    assert np.mean(moved) > 0.7
