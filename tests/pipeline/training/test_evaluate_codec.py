"""The codec is measured on pictures that repeat by number, and a still background is told from a restless one."""

from dataclasses import replace

import numpy as np
import pytest

from pipeline.codec import PocketCodec
from pipeline.config import ModelConfig
from pipeline.training import world
from pipeline.training.asks import CLIPS_SEED, asks
from pipeline.training.evaluate_codec import (
    background_noises,
    camera_clips,
    codec_psnr_db,
    coded,
    render_clips,
    streaming_gap,
)


@pytest.fixture(scope="module")
def wide(config: ModelConfig) -> ModelConfig:
    """Large enough to have a background beside the mover."""
    return replace(config, width=160, height=96)


def test_clips_fill_whole_chunks_and_repeat(config: ModelConfig) -> None:
    for make in (render_clips, camera_clips):
        clips, again = make(config, 3), make(config, 2)
        assert [clip.shape for clip in clips] == [(16, config.height, config.width, 3)] * 3
        assert all(np.array_equal(one, other) for one, other in zip(again, clips, strict=False))
        assert not np.array_equal(clips[0], clips[1])


def test_psnr_is_the_mean_over_clips(config: ModelConfig, codec: PocketCodec) -> None:
    clips = render_clips(config, 2)
    each = [codec_psnr_db(codec, [clip]) for clip in clips]
    assert codec_psnr_db(codec, clips) == pytest.approx(np.mean(each))
    assert coded(codec, clips[0]).shape == clips[0].shape


def test_streaming_equals_batch(config: ModelConfig, codec: PocketCodec) -> None:
    assert streaming_gap(codec, render_clips(config, 2), config.frames_per_chunk) < 1e-5


def test_a_codec_that_forgets_the_past_does_not_equal_itself_in_streaming(config: ModelConfig) -> None:
    class Forgetful(PocketCodec):
        def decode_push(self, memory: object, latents_TCHW: object) -> object:  # type: ignore[override]
            return self.decode(latents_TCHW[None])[0]  # type: ignore[index]

    codec = Forgetful(config.codec).eval()
    assert streaming_gap(codec, render_clips(config, 1), config.frames_per_chunk) > 1e-3


def test_a_coded_render_is_as_quiet_as_the_codec_and_noise_is_louder(wide: ModelConfig, codec: PocketCodec) -> None:
    asked = asks(CLIPS_SEED, 2)
    times_s = np.arange(32) / wide.fps
    quiet = [coded(codec, world.render(ask.scene, times_s, wide.width, wide.height)) for ask in asked]
    rng = np.random.default_rng(1)
    loud = [np.clip(clip + rng.normal(0, 60, clip.shape), 0, 255).astype(np.uint8) for clip in quiet]
    size = (wide.width, wide.height)
    centres = np.stack([world.track(ask.scene, times_s[::4], *size) / size for ask in asked])
    ratios = [noise.ratio for noise in background_noises(codec, wide, asked, quiet, centres)]
    louder = [noise.ratio for noise in background_noises(codec, wide, asked, loud, centres)]
    seen = np.isfinite(ratios)
    assert seen.any()
    assert (np.array(ratios)[seen] <= 1 + 1e-9).all()
    assert (np.array(louder)[seen] > 1.5).all()
