import numpy as np
import pytest
from aiortc.codecs import h264, vpx
from aiortc.codecs.base import Encoder

from streaming.frames import to_video
from streaming.rates import rates_for, tune_encoders

SIZES = [(320, 192), (512, 288), (832, 480)]
pytestmark = pytest.mark.usefixtures("tuned")


@pytest.mark.parametrize("size", SIZES)
def test_a_picture_gets_enough_bits_from_its_first_frame(size: tuple[int, int]) -> None:
    rates = rates_for(16, *size)
    assert rates.start_bps >= 1_200_000
    assert rates.lowest_bps < rates.start_bps < rates.highest_bps
    assert rates.start_bps / (size[0] * size[1] * 16) > 0.7


def test_larger_pictures_get_more() -> None:
    starts = [rates_for(16, *size).start_bps for size in SIZES]
    assert starts == sorted(set(starts))


@pytest.mark.parametrize("make", [h264.H264Encoder, vpx.Vp8Encoder])
def test_new_encoders_start_at_the_tuned_rate_and_stay_in_its_bounds(make: type[Encoder]) -> None:
    rates = tune_encoders(16, 320, 192)
    encoder = make()
    assert encoder.target_bitrate == rates.start_bps
    encoder.target_bitrate = 50_000
    assert encoder.target_bitrate == rates.lowest_bps
    encoder.target_bitrate = 50_000_000
    assert encoder.target_bitrate == rates.highest_bps


@pytest.mark.parametrize("make", [h264.H264Encoder, vpx.Vp8Encoder])
def test_noise_is_sent_at_the_tuned_rate_not_at_half_of_it(make: type[Encoder]) -> None:
    fps, seconds = 16, 4
    rates = tune_encoders(fps, 320, 192)
    encoder = make()
    rng = np.random.default_rng(0)
    sizes = []
    for index in range(fps * seconds):
        noise_HWC = rng.integers(0, 255, (48, 80, 3), dtype=np.uint8).repeat(4, axis=0).repeat(4, axis=1)
        payloads, timestamp = encoder.encode(to_video(noise_HWC, pts=index * 5625))
        assert timestamp == index * 5625
        sizes.append(sum(map(len, payloads)))
    sent_bps = sum(sizes[fps:]) * 8 / (seconds - 1)
    assert 0.75 * rates.start_bps < sent_bps < 1.4 * rates.start_bps
