"""Wan's autoencoder in pieces is Wan's autoencoder at once, in both directions, for streams side by side."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.errors import PipelineError
from pipeline.wan_codec import WanCodec, load_wan_codec


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLWan:
    torch.manual_seed(4)
    made = AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.5, 2.0, 1.0],
    )
    return made.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def codec(vae: AutoencoderKLWan) -> WanCodec:
    return WanCodec(vae)


def pictures(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, 32, 48, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def latents(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 4, 4, 6, generator=torch.Generator().manual_seed(seed))


def at_once(vae: AutoencoderKLWan, frames_TCHW: Tensor) -> Tensor:
    """Normalised latents of a whole clip by diffusers' own batch code."""
    mean, deviation = (torch.tensor(vae.config[name])[:, None, None] for name in ("latents_mean", "latents_std"))
    coded = vae.encode(frames_TCHW.transpose(0, 1)[None]).latent_dist.mode()[0].transpose(0, 1)
    return (coded - mean) / deviation


def decoded_at_once(vae: AutoencoderKLWan, latents_TCHW: Tensor) -> Tensor:
    mean, deviation = (torch.tensor(vae.config[name])[:, None, None] for name in ("latents_mean", "latents_std"))
    return vae.decode((latents_TCHW * deviation + mean).transpose(0, 1)[None]).sample[0].transpose(0, 1)


@pytest.mark.parametrize("pieces", [(13,), (1, 4, 8), (1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1), (5, 3, 5), (4, 4, 5)])
def test_a_stream_of_pictures_is_encoded_as_the_whole_clip(
    vae: AutoencoderKLWan, codec: WanCodec, pieces: tuple[int, ...]
) -> None:
    memory, frames = codec.remember(), pictures(13)
    found = [codec.encode_push(memory, piece) for piece in frames.split(list(pieces))]
    made = torch.cat([part for part in found if part is not None])
    assert made.shape == (4, 4, 4, 6)
    torch.testing.assert_close(made, at_once(vae, frames))


def test_the_first_picture_is_a_latent_frame_alone_and_then_four_are(codec: WanCodec) -> None:
    memory = codec.remember()
    counts = [codec.encode_push(memory, pictures(1, seed)) is not None for seed in range(9)]
    assert counts == [True, False, False, False, True, False, False, False, True]


@pytest.mark.parametrize("pieces", [(5,), (1, 1, 1, 1, 1), (3, 2), (2, 3)])
def test_a_stream_of_latents_is_decoded_as_the_whole_clip(
    vae: AutoencoderKLWan, codec: WanCodec, pieces: tuple[int, ...]
) -> None:
    memory, whole = codec.remember(), latents(5)
    parts = [codec.decode_push(memory, piece) for piece in whole.split(list(pieces))]
    assert len(parts[0]) == 1 + 4 * (pieces[0] - 1)
    made = torch.cat(parts)
    assert made.shape == (17, 3, 32, 48)
    torch.testing.assert_close(made, decoded_at_once(vae, whole))


def test_two_streams_do_not_see_each_other_and_a_reset_is_a_new_one(codec: WanCodec) -> None:
    one, two = codec.remember(), codec.remember()
    alone = torch.cat([codec.decode_push(one, piece) for piece in latents(4, 1).split(2)])
    one.reset()
    mixed = []
    for mine, other in zip(latents(4, 1).split(2), latents(4, 2).split(2), strict=True):
        mixed.append(codec.decode_push(one, mine))
        codec.decode_push(two, other)
    assert torch.equal(torch.cat(mixed), alone)


def test_a_picture_that_waits_is_forgotten_by_a_reset(codec: WanCodec) -> None:
    memory = codec.remember()
    codec.encode_push(memory, pictures(3))
    memory.reset()
    first = codec.encode_push(memory, pictures(1, 7))
    fresh = codec.encode_push(codec.remember(), pictures(1, 7))
    assert first is not None and fresh is not None and torch.equal(first, fresh)


def test_there_and_back_has_as_many_pictures(codec: WanCodec) -> None:
    coded = codec.encode_push(codec.remember(), pictures(9))
    assert coded is not None
    assert codec.decode_push(codec.remember(), coded).shape == (9, 3, 32, 48)


def test_a_folder_of_diffusers_is_read_back_and_each_wrong_one_is_refused(
    vae: AutoencoderKLWan, codec: WanCodec, tmp_path: Path
) -> None:
    vae.save_pretrained(tmp_path)
    read, weights = load_wan_codec(tmp_path), tmp_path / "diffusion_pytorch_model.safetensors"
    torch.testing.assert_close(
        read.decode_push(read.remember(), latents(2)), codec.decode_push(codec.remember(), latents(2))
    )

    def refused() -> PipelineError:
        with pytest.raises(PipelineError) as error:
            load_wan_codec(tmp_path)
        return error.value

    values = load_file(weights)
    save_file({name: value for name, value in values.items() if name != "quant_conv.bias"}, weights)
    assert "1 is missing (quant_conv.bias)" in refused().message
    weights.write_bytes(weights.read_bytes()[:5000])
    assert refused().code == "checkpoint_damaged"
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"patch_size": 2}))
    assert refused().code == "checkpoint_mismatch"
    (tmp_path / "config.json").unlink()
    assert refused().code == "weights_missing"
