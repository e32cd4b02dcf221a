"""What counts as motion, on drawn pictures: a mover, noise, light, a slow hand, a camera that pans."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.motion import BLOCK, WILD, ProbeMotion, Sensitivity, SourceMotion, block_means

HEIGHT, WIDTH, PICTURES, PER_LATENT = 96, 160, 8, 4
DIALS = (0.1, 0.5, 1.0)


def room(seed: int = 0) -> Tensor:
    """A textured still picture, (3, H, W) from -1 to 1."""
    coarse = torch.rand(3, HEIGHT // 8, WIDTH // 8, generator=torch.Generator().manual_seed(seed))
    return coarse.repeat_interleave(8, 1).repeat_interleave(8, 2) * 1.2 - 0.6


def clip(*boxes: tuple[int, int, int, int], noise: float = 0.0, seed: int = 0, gain: float = 1.0) -> Tensor:
    """A chunk of the room with one white box (y, x, height, width) in each picture, or in none."""
    frames = room().expand(PICTURES, -1, -1, -1).clone()
    for frame, (y, x, height, width) in zip(frames, boxes, strict=False):
        frame[:, y : y + height, x : x + width] = 0.9
    frames = (frames + 1) * gain - 1
    return frames + noise * torch.randn(frames.shape, generator=torch.Generator().manual_seed(seed + 1))


def settled(dial: float, first: Tensor) -> SourceMotion:
    motion = SourceMotion("cpu", HEIGHT, WIDTH)
    assert motion.look(first, PER_LATENT, False, Sensitivity.of(dial)) is None
    motion.keep(None)
    return motion


def look(motion: SourceMotion, frames: Tensor, dial: float) -> np.ndarray:
    mask = motion.look(frames, PER_LATENT, True, Sensitivity.of(dial))
    assert mask is not None
    motion.keep(mask)
    return mask


@pytest.mark.parametrize("dial", DIALS)
def test_a_mover_is_seen_where_it_was_and_where_it_goes_and_nowhere_far_away(dial: float) -> None:
    motion = settled(dial, clip(*[(40, 40, 16, 16)] * 8))
    mask = look(motion, clip(*[(40, 40 + 4 * step, 16, 16) for step in range(8)]), dial)
    assert mask[1, 1:3].all()
    assert not mask[:, 4:].any()
    assert not mask[2].any()


@pytest.mark.parametrize("dial", DIALS)
@pytest.mark.parametrize("noise", [0.01, 0.04, 0.08])
def test_sensor_noise_is_no_motion_and_hides_none(dial: float, noise: float) -> None:
    motion = settled(dial, clip(noise=noise))
    for seed in range(1, 4):
        assert look(motion, clip(noise=noise, seed=seed), dial).mean() <= 0.07
    assert look(motion, clip(*[(40, 40, 16, 16)] * 8, noise=noise, seed=9), dial)[1, 1]


@pytest.mark.parametrize("dial", DIALS)
def test_who_left_the_picture_is_not_kept_there(dial: float) -> None:
    motion = settled(dial, clip(*[(40, 40, 16, 16)] * 8))
    assert look(motion, clip(), dial)[1, 1]
    assert not look(motion, clip(), dial).any()


def test_what_a_person_can_just_see_is_seen_at_the_quality_end_of_the_dial_and_not_at_the_other() -> None:
    """Nine levels of 255 in a stripe of half a block."""
    frames = clip()
    frames[3, :, 40:56, 70:72] += 0.07
    assert look(settled(0.1, clip()), frames, 0.1).sum() == 1
    assert not look(settled(1.0, clip()), frames, 1.0).any()


def test_change_too_slow_to_see_between_chunks_adds_up() -> None:
    """A shade that grows by less than the threshold a chunk: against the picture before it would never be seen."""
    motion, seen = settled(0.5, clip()), []
    for step in range(1, 12):
        frames = clip()
        frames[:, :, 32:64, 64:96] += 0.012 * step
        seen.append(bool(look(motion, frames, 0.5)[1, 2]))
    assert not seen[0]
    assert 1 <= sum(seen) <= 6


def test_a_slow_drift_of_brightness_is_followed_by_all_at_once_and_a_small_one_by_none() -> None:
    motion = settled(0.5, clip())
    assert not look(motion, clip(gain=1.02), 0.5).any()
    assert motion.look(clip(gain=1.06), PER_LATENT, True, Sensitivity.of(0.5)) is None


def test_light_is_followed_where_a_person_could_see_it_and_once() -> None:
    """Bright tiles before dark ones; what was followed is not asked for again, and a mover is told from both."""

    def lit(gain: float, *boxes: tuple[int, int, int, int]) -> Tensor:
        frames = clip(*boxes)
        frames[..., 96:] = (frames[..., 96:] + 1) * 0.3 - 1
        return (frames + 1) * gain - 1

    dial = 0.5
    motion = settled(dial, lit(1))
    assert not look(motion, lit(1.02), dial).any()
    followed = look(motion, lit(1.06), dial)
    assert followed[:, :3].all()
    assert not followed[:, 3:].any()
    assert not look(motion, lit(1.06), dial).any()
    mover = look(motion, lit(1.06, *[(40, 136, 12, 12)] * 8), dial)
    assert mover[1, 4]
    assert mover.sum() == 1
    back = look(motion, lit(1, *[(40, 136, 12, 12)] * 8), dial)
    assert back[:, :3].all()
    assert not back[:, 3].any()


def test_blocks_that_moved_are_told_with_those_around_them() -> None:
    motion = settled(0.5, clip())
    look(motion, clip(*[(40, 40, 16, 16)] * 8), 0.5)
    moved = motion.moved_HW
    assert moved[9:15, 9:15].all()
    assert moved.sum() == 36


def test_a_camera_that_moves_leaves_nothing_to_hold() -> None:
    motion = settled(0.5, clip())
    panned = torch.stack([room().roll(3 + step, -1) for step in range(PICTURES)])
    assert motion.look(panned, PER_LATENT, True, Sensitivity.of(0.5)) is None


def test_a_single_odd_block_is_a_speck() -> None:
    motion, frames = settled(0.5, clip()), clip()
    frames[3, :, 40:44, 40:44] += 0.3
    assert not look(motion, frames, 0.5).any()


def test_where_it_moved_a_smaller_change_will_do() -> None:
    def shade(depth: float) -> Tensor:
        frames = clip()
        frames[3:5, :, 32:64, 64:96] += depth
        return frames

    limit = Sensitivity.of(0.5).floor
    calm, moved = settled(0.5, clip()), settled(0.5, clip())
    assert look(moved, shade(2 * limit), 0.5)[1, 2]
    moved.keep(None)
    moved.reference_CHW.copy_(calm.reference_CHW)
    assert not look(calm, shade(0.8 * limit), 0.5)[1, 2]
    assert look(moved, shade(0.8 * limit), 0.5)[1, 2]


def test_the_probe_sees_what_will_change_above_what_noise_does_to_it() -> None:
    generator = torch.Generator().manual_seed(0)
    motion, sensitivity = ProbeMotion("cpu", (8, 6, 10), (3, 5)), Sensitivity.of(0.8)
    base = torch.randn(2, 8, 6, 10, generator=generator)
    base[1] = base[0]
    assert motion.look(base, False, sensitivity) is None
    motion.keep(torch.zeros(6, 10), None, sensitivity)
    moved = base + 0.04 * torch.randn(base.shape, generator=generator)
    moved[:, :, 2:4, 4:6] += 2 * sensitivity.drift
    mask = motion.look(moved, True, sensitivity)
    assert mask is not None
    assert mask[1, 2]
    assert mask.sum() == 1


@pytest.mark.parametrize("dial", DIALS)
def test_where_the_first_pass_drew_much_change_it_is_looked_for_sixteen_pixels_around(dial: float) -> None:
    """One cell of 16 pixels, in the lower right of its tile: what is drawn there may end in the tiles on that side."""
    motion, sensitivity = ProbeMotion("cpu", (8, 6, 10), (3, 5)), Sensitivity.of(dial)
    motion.look(torch.zeros(2, 8, 6, 10), False, sensitivity)
    for change, tiles in ((WILD - 0.1, 1), (WILD + 0.1, 4)):
        drawn = torch.zeros(2, 8, 6, 10)
        drawn[1, :, 3, 5] = change * sensitivity.drift
        mask = motion.look(drawn, True, sensitivity)
        assert mask is not None
        assert mask[1:, 2:4].sum() == mask.sum() == tiles


def test_where_the_first_pass_leaves_still_places_exactly_as_they_were_a_small_change_is_no_motion_yet() -> None:
    """As a gate over the frame before does: no noise is left to set the limit by."""
    motion, sensitivity = ProbeMotion("cpu", (8, 6, 10), (3, 5)), Sensitivity.of(0.5)
    still = torch.randn(1, 8, 6, 10, generator=torch.Generator().manual_seed(0)).expand(2, -1, -1, -1)
    motion.look(still, False, sensitivity)
    motion.keep(torch.zeros(6, 10), None, sensitivity)
    for change, moved in ((0.5, 0), (2, 1)):
        drawn = still.clone()
        drawn[:, :, 2:4, 4:6] += change * sensitivity.drift
        mask = motion.look(drawn, True, sensitivity)
        assert mask is not None
        assert mask.sum() == moved


def test_what_moved_a_chunk_ago_is_computed_once_more() -> None:
    motion, sensitivity = ProbeMotion("cpu", (8, 6, 10), (3, 5)), Sensitivity.of(0.8)
    still = torch.zeros(2, 8, 6, 10)
    motion.look(still, False, sensitivity)
    moved = torch.zeros(6, 10)
    moved[0:2, 0:2] = 1
    motion.keep(moved, None, sensitivity)
    mask = motion.look(still, True, sensitivity)
    assert mask is not None
    assert mask[0, 0]
    assert mask.sum() == 1


def test_means_over_blocks_are_those_of_a_pooling() -> None:
    frames = clip(noise=0.1)
    for each in (frames, frames.contiguous(memory_format=torch.channels_last)):
        torch.testing.assert_close(block_means(each), F.avg_pool2d(each, BLOCK), atol=1e-6, rtol=1e-5)
