"""The streaming codec equals its batch form, forgets on request, and keeps its hands off what is far away."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.codec import CodecMemory, PocketCodec, frames_to_pixels, pixels_to_frames
from pipeline.config import ModelConfig
from pipeline.tiles import Tiles


def pictures(count: int, height: int = 32, width: int = 48) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(3)) * 2 - 1


def latents(config: ModelConfig, count: int, height: int = 2, width: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(count, config.codec.latent_channels, height, width, generator=generator)


def encode_in_parts(codec: PocketCodec, memory: CodecMemory, frames: Tensor, sizes: list[int]) -> Tensor:
    made = [codec.encode_push(memory, part) for part in frames.split(sizes)]
    return torch.cat([part for part in made if part is not None])


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6))
@settings(max_examples=25, deadline=None)
def test_pictures_pushed_in_any_split_encode_as_the_whole_clip_does(codec: PocketCodec, sizes: list[int]) -> None:
    frames, memory = pictures(sum(sizes)), CodecMemory()
    whole = len(frames) // 4 * 4
    parts = [codec.encode_push(memory, part) for part in frames.split(sizes)]
    made = [part for part in parts if part is not None]
    assert sum(map(len, made)) == whole // 4
    assert sum(map(len, memory.pending_TCHW)) == len(frames) - whole
    if made:
        torch.testing.assert_close(torch.cat(made), codec.encode(frames[None, :whole])[0], atol=1e-5, rtol=1e-5)


def test_the_encoder_answers_none_until_a_latent_frame_is_full(codec: PocketCodec, config: ModelConfig) -> None:
    frames, memory = pictures(5), CodecMemory()
    made = [codec.encode_push(memory, frames[at : at + 1]) for at in range(5)]
    assert [part is None for part in made] == [True, True, True, False, True]
    assert made[3] is not None
    assert made[3].shape == (1, config.codec.latent_channels, 2, 3)


def test_a_clip_that_does_not_fill_its_latent_frames_is_our_own_mistake(codec: PocketCodec) -> None:
    with pytest.raises(AssertionError, match="6 frames"):
        codec.encode(pictures(6)[None])


@given(sizes=st.lists(st.integers(1, 3), min_size=1, max_size=5))
@settings(max_examples=15, deadline=None)
def test_latents_pushed_in_any_split_decode_as_the_whole_clip_does(
    codec: PocketCodec, config: ModelConfig, sizes: list[int]
) -> None:
    clip, memory = latents(config, sum(sizes)), CodecMemory()
    made = torch.cat([codec.decode_push(memory, part) for part in clip.split(sizes)])
    assert made.shape == (4 * len(clip), 3, 32, 48)
    torch.testing.assert_close(made, codec.decode(clip[None])[0], atol=1e-5, rtol=1e-5)


def test_the_decoder_looks_one_latent_frame_back_and_never_ahead(codec: PocketCodec, config: ModelConfig) -> None:
    clip = latents(config, 4)[None]
    changed = clip.clone()
    changed[:, 1] += 1
    moved = (codec.decode(changed) - codec.decode(clip)).abs().amax((0, 2, 3, 4)).unflatten(0, (4, 4)).amax(1)
    assert moved[0] == 0
    assert moved[1] > 1e-3
    assert moved[2] > 1e-3
    assert moved[3] == 0


def test_a_latent_frame_carries_its_own_pictures_alone(codec: PocketCodec) -> None:
    frames = pictures(12)[None]
    changed = frames.clone()
    changed[:, 5] = 0
    same = (codec.encode(changed) == codec.encode(frames)).flatten(2).all(2)[0]
    assert same.tolist() == [True, False, True]


def test_a_far_tile_changes_no_bit_of_the_other_side(codec: PocketCodec, config: ModelConfig) -> None:
    clip = latents(config, 2, height=2, width=20)[None]
    changed = clip.clone()
    changed[..., 0] += 1
    before, after = codec.decode(clip), codec.decode(changed)
    assert not torch.equal(before[..., :16], after[..., :16])
    assert torch.equal(before[..., 240:], after[..., 240:])

    frames = pictures(8, 32, 320)[None]
    changed = frames.clone()
    changed[..., :16] *= -1
    before, after = codec.encode(frames), codec.encode(changed)
    assert not torch.equal(before[..., :1], after[..., :1])
    assert torch.equal(before[..., 10:], after[..., 10:])


def test_a_reset_memory_equals_a_fresh_one(codec: PocketCodec, config: ModelConfig) -> None:
    used = CodecMemory()
    codec.encode_push(used, pictures(3))
    codec.decode_push(used, latents(config, 1) + 1)
    used.reset()
    assert used == CodecMemory()
    for memory in (used, CodecMemory()):
        assert torch.equal(encode_in_parts(codec, memory, pictures(8), [3, 5]), codec.encode(pictures(8)[None])[0])
        assert torch.equal(codec.decode_push(memory, latents(config, 2)), codec.decode(latents(config, 2)[None])[0])


def test_memory_holds_no_more_than_an_unfilled_latent_frame(codec: PocketCodec) -> None:
    memory = CodecMemory()
    for part in pictures(70).split(7):
        codec.encode_push(memory, part)
        assert sum(map(len, memory.pending_TCHW)) < 4


def test_every_byte_survives_the_way_to_float_and_back() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3).reshape(1, 16, 16, 3)
    frames = pixels_to_frames(pixels)
    assert frames.shape == (1, 3, 16, 16)
    assert frames.min() == -1
    assert frames.max() == 1
    assert torch.equal(frames_to_pixels(frames), pixels)


def test_pictures_out_of_range_are_clipped_not_wrapped() -> None:
    frames = torch.tensor([-9.0, -1.001, 1.001, 9.0]).reshape(1, 1, 2, 2).expand(1, 3, 2, 2)
    pixels = frames_to_pixels(frames).numpy()
    assert pixels.dtype == np.uint8
    assert pixels[0, ..., 0].tolist() == [[0, 0], [255, 255]]


def test_training_keeps_the_brightness_of_a_batch_in_its_latents(config: ModelConfig) -> None:
    """A batch's own statistics would take it away, and dark and bright pictures would have the same latents."""
    torch.manual_seed(0)
    codec = PocketCodec(config.codec).train()
    codec.normalise.running_var.fill_(0.01)  # type: ignore[union-attr]
    picture = torch.rand(2, 4, 3, 64, 96) * 0.2
    with torch.no_grad():
        dark, bright = codec.encode(picture - 0.8), codec.encode(picture + 0.6)
    moved = (bright.mean((0, 1, 3, 4)) - dark.mean((0, 1, 3, 4))).abs().max()
    assert moved > 1
    assert codec.normalise.running_mean.abs().max() > 0  # type: ignore[union-attr]


def test_in_bfloat16_pictures_and_latents_are_nearly_the_same_and_come_in_single_precision(
    codec: PocketCodec, config: ModelConfig
) -> None:
    narrow = deepcopy(codec).narrow()
    frames, coded = pictures(8), latents(config, 2)
    for exact, quick in (
        (codec.encode(frames[None]), narrow.encode(frames[None])),
        (codec.decode(coded[None]), narrow.decode(coded[None])),
    ):
        assert quick.dtype == torch.float32
        assert 0 < (quick - exact).square().mean() < 1e-4 * exact.square().mean()
    assert all(value.dtype == torch.float32 for value in codec.parameters()), "the one it was made of stays"


def test_in_bfloat16_chosen_tiles_are_as_near_to_a_whole_as_it_is_to_single_precision(
    codec: PocketCodec, config: ModelConfig
) -> None:
    narrow, tiles = deepcopy(codec).narrow(), Tiles.of(np.array([[1, 0, 0, 0], [1, 0, 0, 0]], bool))
    first, second = latents(config, 4, 4, 8).split(2)
    standing = first[1:].expand(2, -1, -1, -1)
    changed, made = standing.clone(), []
    tiles.scatter(tiles.gather(second), changed)  # the other tiles are held
    for each in (codec, narrow):
        memory = each.remember()
        each.decode_tiles(memory, standing, None)
        made.append(each.decode_tiles(memory, changed, tiles))
    wanted, quick = made
    assert quick.dtype == torch.float32
    assert 0 < (quick - wanted).square().mean() < 1e-4 * wanted.square().mean()


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_what_training_compiles_is_what_runs(codec: PocketCodec, config: ModelConfig, part: str) -> None:
    """Layers that were called one by one would stay eager and say nothing."""
    torch.compiler.reset()
    compiled, graphs = deepcopy(codec), []

    def backend(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    getattr(compiled, part).compile(backend=backend)
    if part == "encoder":
        frames = pictures(8)[None]
        torch.testing.assert_close(compiled.encode(frames), codec.encode(frames))
    else:
        coded = latents(config, 2)[None]
        torch.testing.assert_close(compiled.decode(coded), codec.decode(coded))
    assert graphs
