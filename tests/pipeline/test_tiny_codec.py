"""The tiny encoder and decoder read TAEHV's file, and a stream in pieces is the stream at once."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from pipeline.errors import PipelineError
from pipeline.tiny_codec import TinyDecoder, TinyEncoder, load_tiny_decoder, load_tiny_encoder
from tests.pipeline.published import taehv

WIDTHS = (16, 8, 8, 8)
WIDTH = 8
CHANNELS = 4


@pytest.fixture
def published() -> dict[str, Tensor]:
    return taehv(CHANNELS, WIDTHS, WIDTH)


@pytest.fixture
def decoder(published: dict[str, Tensor], tmp_path: Path) -> TinyDecoder:
    save_file(published, tmp_path / "taew2_1.safetensors")
    return load_tiny_decoder(tmp_path / "taew2_1.safetensors", TinyDecoder(CHANNELS, WIDTHS)).double()


@pytest.fixture
def encoder(published: dict[str, Tensor], tmp_path: Path) -> TinyEncoder:
    save_file(published, tmp_path / "taew2_1.safetensors")
    loaded = load_tiny_encoder(tmp_path / "taew2_1.safetensors", TinyEncoder(CHANNELS, WIDTH))
    assert loaded is not None
    return loaded.double()


def pictures(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, 16, 24, generator=generator, dtype=torch.float64) * 2 - 1


def latents(count: int, seed: int = 0) -> Tensor:
    """In double precision: random weights make much of the last bits."""
    return torch.randn(count, CHANNELS, 4, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class FrameByFrame:
    """The same networks written out, one frame through one layer at a time."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights

    def conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"].double(), self.weights.get(f"{name}.bias")
        return F.conv2d(x, weight, None if bias is None else bias.double(), stride, weight.shape[-1] // 2)

    def recall(self, row: str, start: int, frames: list[Tensor]) -> list[Tensor]:
        for block in range(start, start + 3):
            before, out = torch.zeros_like(frames[0]), []
            for frame in frames:
                x = self.conv(f"{row}.{block}.conv.0", torch.cat((frame, before), 1)).relu()
                x = self.conv(f"{row}.{block}.conv.4", self.conv(f"{row}.{block}.conv.2", x).relu())
                out.append((x + frame).relu())
                before = frame
            frames = out
        return frames

    def decode(self, latents_TCHW: Tensor) -> Tensor:
        frames = [self.conv("decoder.1", torch.tanh(latent[None] / 3) * 3).relu() for latent in latents_TCHW]
        for start, growth in ((3, 1), (9, 2), (15, 2)):
            frames = [F.interpolate(frame, scale_factor=2) for frame in self.recall("decoder", start, frames)]
            grown = [self.conv(f"decoder.{start + 4}.conv", frame) for frame in frames]
            frames = [self.conv(f"decoder.{start + 5}", part) for frame in grown for part in frame.chunk(growth, 1)]
        made = [self.conv("decoder.22", frame.relu()).clamp(0, 1) for frame in frames]
        return torch.cat(made)[3:] * 2 - 1

    def encode(self, frames_TCHW: Tensor) -> Tensor:
        """A clip, which its last picture fills up to a multiple of four."""
        clip = list((frames_TCHW + 1) / 2)
        clip += [clip[-1]] * (-len(clip) % 4)
        frames = [self.conv("encoder.0", frame[None]).relu() for frame in clip]
        for start, shrinkage in ((2, 2), (7, 2), (12, 1)):
            groups = [torch.cat(frames[at : at + shrinkage], 1) for at in range(0, len(frames), shrinkage)]
            pooled = [self.conv(f"encoder.{start}.conv", group) for group in groups]
            halved = [self.conv(f"encoder.{start + 1}", frame, 2) for frame in pooled]
            frames = self.recall("encoder", start + 2, halved)
        return torch.cat([self.conv("encoder.17", frame) for frame in frames])


def test_it_is_the_network_that_taehv_describes(published: dict[str, Tensor], decoder: TinyDecoder) -> None:
    made = decoder.decode_push(decoder.remember(), latents(3))
    assert made.shape == (9, 3, 32, 48)
    assert ((made > -1) & (made < 1)).float().mean() > 0.1
    torch.testing.assert_close(made, FrameByFrame(published).decode(latents(3)))


def test_a_latent_frame_is_the_last_that_taehv_makes_of_the_clip_up_to_there(
    published: dict[str, Tensor], encoder: TinyEncoder
) -> None:
    made, clip = encoder.encode_push(encoder.remember(), pictures(9)), FrameByFrame(published)
    assert made is not None
    assert made.shape == (3, CHANNELS, 2, 3)
    torch.testing.assert_close(made, torch.cat([clip.encode(pictures(9)[:end])[-1:] for end in (1, 5, 9)]))
    other = torch.cat((pictures(5), pictures(4, 1)))  # what comes after a latent frame is not in it
    again = encoder.encode_push(encoder.remember(), other)
    assert again is not None
    assert torch.equal(made[:2], again[:2])
    assert not torch.allclose(made[2], again[2])


@pytest.mark.parametrize("pieces", [(1, 4, 4, 4), (9, 4), (1,) * 13, (3, 0, 7, 3), (12, 1)])
def test_pictures_in_pieces_are_the_pictures_at_once(encoder: TinyEncoder, pieces: tuple[int, ...]) -> None:
    whole = encoder.encode_push(encoder.remember(), pictures(13))
    memory = encoder.remember()
    parts = [encoder.encode_push(memory, piece) for piece in pictures(13).split(list(pieces))]
    ends = [sum(pieces[: index + 1]) for index in range(len(pieces))]
    counts = [0 if part is None else len(part) for part in parts]
    assert [sum(counts[: index + 1]) for index in range(len(pieces))] == [1 + (end - 1) // 4 for end in ends]
    assert whole is not None
    torch.testing.assert_close(torch.cat([part for part in parts if part is not None]), whole)


def test_a_reset_encoder_knows_no_picture_before(encoder: TinyEncoder) -> None:
    memory = encoder.remember()
    encoder.encode_push(memory, pictures(7, 1))
    memory.reset()
    again, fresh = encoder.encode_push(memory, pictures(5)), encoder.encode_push(encoder.remember(), pictures(5))
    assert again is not None and fresh is not None
    assert torch.equal(again, fresh)


@pytest.mark.parametrize("pieces", [(1, 1, 1, 1, 1), (3, 2), (2, 3), (4, 1)])
def test_a_stream_in_pieces_is_the_stream_at_once(decoder: TinyDecoder, pieces: tuple[int, ...]) -> None:
    whole = decoder.decode_push(decoder.remember(), latents(5))
    memory = decoder.remember()
    parts = [decoder.decode_push(memory, piece) for piece in latents(5).split(list(pieces))]
    assert [len(part) for part in parts] == [4 * count - 3 * (index == 0) for index, count in enumerate(pieces)]
    torch.testing.assert_close(torch.cat(parts), whole)


def test_two_streams_do_not_see_each_other_and_a_reset_is_a_new_one(decoder: TinyDecoder) -> None:
    one, two = decoder.remember(), decoder.remember()
    alone = [decoder.decode_push(one, piece) for piece in latents(4, 1).split(2)]
    one.reset()
    mixed = []
    for mine, other in zip(latents(4, 1).split(2), latents(4, 2).split(2), strict=True):
        mixed.append(decoder.decode_push(one, mine))
        decoder.decode_push(two, other)
    assert torch.equal(torch.cat(mixed), torch.cat(alone))


def test_a_file_that_grows_more_frames_gives_its_newest(published: dict[str, Tensor], tmp_path: Path) -> None:
    name = "decoder.7.conv.weight"
    save_file(published | {name: torch.cat((published[name] + 1, published[name]))}, tmp_path / "more.safetensors")
    more = load_tiny_decoder(tmp_path / "more.safetensors", TinyDecoder(CHANNELS, WIDTHS)).double()
    made = more.decode_push(more.remember(), latents(2))
    torch.testing.assert_close(made, FrameByFrame(published).decode(latents(2)))


def test_the_file_of_another_model_is_refused_with_what_differs(published: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(published, tmp_path / "taew2_1.safetensors")
    torch.save({name: value for name, value in published.items() if name != "decoder.22.bias"}, tmp_path / "cut.pth")
    with pytest.raises(PipelineError) as wide:
        load_tiny_decoder(tmp_path / "taew2_1.safetensors")
    with pytest.raises(PipelineError) as short:
        load_tiny_decoder(tmp_path / "cut.pth", TinyDecoder(CHANNELS, WIDTHS))
    assert wide.value.code == short.value.code == "checkpoint_mismatch"
    assert "enter.weight: 16x4x3x3, not 256x16x3x3" in wide.value.message
    assert "1 is missing (leave.bias)" in short.value.message


def test_a_file_may_be_without_an_encoder_but_not_with_half_of_one(
    published: dict[str, Tensor], tmp_path: Path
) -> None:
    alone = {name: value for name, value in published.items() if name.startswith("decoder.")}
    save_file(alone, tmp_path / "alone.safetensors")
    assert load_tiny_encoder(tmp_path / "alone.safetensors", TinyEncoder(CHANNELS, WIDTH)) is None
    cut = {name: value for name, value in published.items() if name != "encoder.7.conv.weight"}
    save_file(cut | {"encoder.18.bias": torch.zeros(1)}, tmp_path / "cut.safetensors")
    with pytest.raises(PipelineError) as short:
        load_tiny_encoder(tmp_path / "cut.safetensors", TinyEncoder(CHANNELS, WIDTH))
    save_file(published, tmp_path / "taew2_1.safetensors")
    with pytest.raises(PipelineError) as wide:
        load_tiny_encoder(tmp_path / "taew2_1.safetensors")
    assert wide.value.code == short.value.code == "checkpoint_mismatch"
    assert "is not the tiny encoder of Wan 2.1" in short.value.message
    assert "1 is missing (stages.1.pool.weight), 1 is not known (encoder.18.bias)" in short.value.message
    assert "enter.weight: 8x3x3x3, not 64x3x3x3" in wide.value.message
