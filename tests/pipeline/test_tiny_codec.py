"""The tiny decoder reads TAEHV's file, and a stream in pieces is the stream at once."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from pipeline.errors import PipelineError
from pipeline.tiny_codec import TinyDecoder, load_tiny_decoder

WIDTHS = (16, 8, 8, 8)
CHANNELS = 4


@pytest.fixture
def published() -> dict[str, Tensor]:
    """A file as TAEHV has it, in small: the numbers of its layers, and an encoder beside."""
    generator = torch.Generator().manual_seed(6)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * (2 / max(1, torch.Size(shape[1:]).numel())) ** 0.5

    named = {"decoder.1.weight": draw(WIDTHS[0], CHANNELS, 3, 3), "decoder.1.bias": draw(WIDTHS[0])}
    for index, growth in enumerate((1, 2, 2)):
        width, narrower, start = WIDTHS[index], WIDTHS[index + 1], 3 + 6 * index
        for block in range(3):
            for place, inputs in ((0, 2 * width), (2, width), (4, width)):
                named[f"decoder.{start + block}.conv.{place}.weight"] = draw(width, inputs, 3, 3)
                named[f"decoder.{start + block}.conv.{place}.bias"] = draw(width)
        named[f"decoder.{start + 4}.conv.weight"] = draw(growth * width, width, 1, 1)
        named[f"decoder.{start + 5}.weight"] = draw(narrower, width, 3, 3)
    named |= {"decoder.22.weight": draw(3, WIDTHS[3], 3, 3) / 300, "decoder.22.bias": draw(3) / 9 + 0.5}
    return named | {"encoder.0.weight": draw(8, 3, 3, 3), "encoder.0.bias": draw(8)}


@pytest.fixture
def decoder(published: dict[str, Tensor], tmp_path: Path) -> TinyDecoder:
    save_file(published, tmp_path / "taew2_1.safetensors")
    return load_tiny_decoder(tmp_path / "taew2_1.safetensors", TinyDecoder(CHANNELS, WIDTHS)).double()


def latents(count: int, seed: int = 0) -> Tensor:
    """In double precision: random weights make much of the last bits."""
    return torch.randn(count, CHANNELS, 4, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def frame_by_frame(weights: dict[str, Tensor], latents_TCHW: Tensor) -> Tensor:
    """The same network written out, one frame through one layer at a time."""

    def conv(name: str, x: Tensor) -> Tensor:
        weight, bias = weights[f"{name}.weight"].double(), weights.get(f"{name}.bias")
        return F.conv2d(x, weight, None if bias is None else bias.double(), padding=weight.shape[-1] // 2)

    frames = [conv("decoder.1", torch.tanh(latent[None] / 3) * 3).relu() for latent in latents_TCHW]
    for start, growth in ((3, 1), (9, 2), (15, 2)):
        for block in range(start, start + 3):
            before, out = torch.zeros_like(frames[0]), []
            for frame in frames:
                x = conv(f"decoder.{block}.conv.0", torch.cat((frame, before), 1)).relu()
                x = conv(f"decoder.{block}.conv.4", conv(f"decoder.{block}.conv.2", x).relu())
                out.append((x + frame).relu())
                before = frame
            frames = out
        grown = [conv(f"decoder.{start + 4}.conv", F.interpolate(frame, scale_factor=2)) for frame in frames]
        frames = [conv(f"decoder.{start + 5}", part) for frame in grown for part in frame.chunk(growth, 1)]
    pictures = [conv("decoder.22", frame.relu()).clamp(0, 1) for frame in frames]
    return torch.cat(pictures)[3:] * 2 - 1


def test_it_is_the_network_that_taehv_describes(published: dict[str, Tensor], decoder: TinyDecoder) -> None:
    made = decoder.decode_push(decoder.remember(), latents(3))
    assert made.shape == (9, 3, 32, 48)
    assert ((made > -1) & (made < 1)).float().mean() > 0.1
    torch.testing.assert_close(made, frame_by_frame(published, latents(3)))


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
    torch.testing.assert_close(made, frame_by_frame(published, latents(2)))


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
