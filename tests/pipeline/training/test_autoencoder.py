"""The autoencoder's data repeats by number, and its start is already a picture."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.codec import PocketCodec, pixels_to_frames
from pipeline.config import ModelConfig
from pipeline.structure import CHANNELS
from pipeline.training import autoencoder
from pipeline.training.autoencoder import (
    CROP_HEIGHT,
    CROP_WIDTH,
    Crops,
    balance,
    batches,
    item_rng,
    reconstruction_loss,
    start_from_principal_components,
    train_autoencoder,
)
from pipeline.training.settings import AutoencoderSettings

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


@pytest.fixture(scope="module")
def wide(config: ModelConfig) -> ModelConfig:
    """Large enough to crop from."""
    student = replace(config.student, in_channels=8 + CHANNELS, out_channels=8)
    return replace(config, width=192, height=128, student=student, codec=replace(config.codec, latent_channels=8))


@pytest.fixture(scope="module")
def frames(wide: ModelConfig) -> Tensor:
    crops = Crops(wide, seed=1, generic_share=0.35)
    return torch.stack([pixels_to_frames(crops[index]) for index in range(4)])


def test_numbers_are_drawn_by_key_in_any_order() -> None:
    first = item_rng(1, 5).random(4)
    item_rng(2, 0).random(100)
    assert (item_rng(1, 5).random(4) == first).all()
    assert (item_rng(1, 6).random(4) != first).any()
    assert (item_rng(5, 1).random(4) != first).any()


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_crop_is_a_pure_function_of_its_number(wide: ModelConfig, share: float) -> None:
    crops, again = Crops(wide, 1, share), Crops(wide, 1, share)
    for index in (0, 1, 2**39):
        crop = crops[index]
        assert crop.shape == (2 * wide.codec.frames, CROP_HEIGHT, CROP_WIDTH, 3)
        assert crop.dtype == torch.uint8
        assert torch.equal(crop, again[index])
    assert not torch.equal(crops[0], crops[1])
    assert not torch.equal(crops[0], Crops(wide, 2, share)[0])


def test_batches_go_on_from_any_step(wide: ModelConfig) -> None:
    crops = Crops(wide, 1, 0.35)
    batch = next(batches(crops, 2, 3))
    assert torch.equal(batch, torch.stack([crops[6], crops[7]]))


def test_the_principal_start_shows_the_picture_before_any_training(wide: ModelConfig, frames: Tensor) -> None:
    torch.manual_seed(0)
    codec = PocketCodec(wide.codec).eval()
    start_from_principal_components(codec, frames)
    with torch.no_grad():
        latents = codec.encode(frames)
        made = codec.decode(latents)
    constant = frames.mean((0, 1, 3, 4))[:, None, None].expand(frames.shape)
    assert F.mse_loss(made, frames) < 0.35 * F.mse_loss(constant, frames)
    assert latents.mean((0, 1, 3, 4)).abs().max() < 0.05
    torch.testing.assert_close(latents.std((0, 1, 3, 4)), torch.ones(8), atol=0.05, rtol=0)


def test_the_loss_is_zero_for_equal_pictures_and_grows_with_the_error(frames: Tensor) -> None:
    assert reconstruction_loss(frames, frames) == 0
    errors = [reconstruction_loss(frames + size * torch.sign(frames), frames).item() for size in (0.05, 0.1, 0.2)]
    assert errors == sorted(errors)


@pytest.mark.usefixtures("one_second_steps")
def test_a_few_steps_make_a_better_codec_and_a_sheet_to_look_at(
    wide: ModelConfig, frames: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = torch.stack([Crops(wide, 1, 0.35)[index] for index in range(4)])

    def same_again(*_: object) -> Iterator[Tensor]:
        while True:
            yield pixels.repeat(2, 1, 1, 1, 1)

    monkeypatch.setenv("PATH", "")  # no compiler: compiling takes longer than this test
    monkeypatch.setattr(autoencoder, "batches", same_again)
    torch.manual_seed(0)
    start = PocketCodec(wide.codec).eval()
    start_from_principal_components(start, frames)
    settings = AutoencoderSettings(budget_s=5, learning_rate=3e-3, warm_up_steps=1, ema=0.5, batch=8)
    codec = train_autoencoder(wide, tmp_path, settings)
    assert not codec.training
    with torch.no_grad():
        errors = [F.mse_loss(each.decode(each.encode(frames)), frames).item() for each in (codec, start)]
    assert errors[0] < errors[1]
    assert (tmp_path / "sample.png").stat().st_size > 0


def test_balanced_channels_carry_weight_by_what_they_move_and_the_picture_stays(wide: ModelConfig) -> None:
    torch.manual_seed(0)
    codec = PocketCodec(wide.codec)
    coarse = torch.rand(4, 3, 2, 4, 6) * 2 - 1
    frames = F.interpolate(coarse, size=(8, 64, 96), mode="trilinear").transpose(1, 2)
    start_from_principal_components(codec, frames)
    codec.eval().requires_grad_(False)
    before = codec.decode(codec.encode(frames))
    balance(codec, frames)
    torch.testing.assert_close(codec.decode(codec.encode(frames)), before, atol=1e-4, rtol=1e-4)
    assert codec.scale.square().mean().item() == pytest.approx(1.0, abs=1e-4)
    assert codec.scale[0] > codec.scale[-1]
