"""A column of tiles through layers that remember rims, against whole pictures through the same layers."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from pipeline.rims import Part, Whole, cut_rims, grid_of, pays
from pipeline.tiles import Tiles
from pipeline.tiny_codec import TinyDecoder, TinyEncoder, load_tiny_decoder, load_tiny_encoder
from tests.pipeline.published import taehv

ROWS, COLUMNS = 1, 11
REACHED = 6  # columns of tiles: what changes in the first of them is seen in five more, 142 pixels away

Push = Callable[[Tensor], Tensor]
Choose = Callable[[Tensor, Tiles | None], Tensor]


def chosen(*columns: int) -> Tiles:
    mask = np.zeros((ROWS, COLUMNS), bool)
    mask[:, list(columns)] = True
    return Tiles.of(mask)


class Direction:
    """One direction of a tiny codec, twice: a stream that is computed whole, and one of which a part is.

    cells: of a tile along each side, of what goes in. count: frames that go in at a time.
    """

    def __init__(self, codec: TinyDecoder | TinyEncoder) -> None:
        whole, part = codec.remember(), codec.remember()
        if isinstance(codec, TinyDecoder):
            self.push: Push = lambda x: codec.decode_push(whole, x)
            self.choose: Choose = lambda x, tiles: codec.decode_tiles(part, x, tiles)
            self.cells, self.channels, self.count = 4, 4, 2
        else:
            self.push = lambda x: codec.encode_push(whole, x)  # type: ignore[return-value]
            self.choose = lambda x, tiles: codec.encode_tiles(part, x, tiles)
            self.cells, self.channels, self.count = 32, 3, 8
        self.random = torch.Generator().manual_seed(3)

    def draw(self, count: int) -> Tensor:
        shape = (count, self.channels, ROWS * self.cells, COLUMNS * self.cells)
        drawn = torch.rand(shape, generator=self.random, dtype=torch.float64)
        return drawn * 2 - 1

    def stand(self, chunks: int = 5) -> Tensor:
        """Whole chunks that show the same, until both streams have forgotten that they began; that frame."""
        still = self.draw(1)
        for _ in range(chunks):
            x = still.expand(self.count, -1, -1, -1)
            assert torch.equal(self.choose(x, None), self.push(x))
        return still


@pytest.fixture(params=["decoder", "encoder"])
def codec(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyDecoder | TinyEncoder:
    path = tmp_path_factory.mktemp("tiny") / "taew2_1.pth"
    torch.save(taehv(4, (8, 8, 4, 4), 4), path)
    if request.param == "decoder":
        return load_tiny_decoder(path, TinyDecoder(4, (8, 8, 4, 4))).double()
    encoder = load_tiny_encoder(path, TinyEncoder(4, 4))
    assert encoder is not None
    return encoder.double()


@pytest.fixture
def stream(codec: TinyDecoder | TinyEncoder) -> Direction:
    return Direction(codec)


def near(made: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(made, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("size", "stride", "grow"), [(2, 1, 1), (4, 2, 1), (4, 1, 2), (8, 1, 1)])
def test_a_layer_sees_around_a_tile_what_the_whole_picture_has_there(size: int, stride: int, grow: int) -> None:
    layer = nn.Conv2d(3, 5, 3, stride, padding=1).requires_grad_(False)
    before, now = torch.rand(2, 2, 3, 3 * size, 4 * size)
    mask = np.array([[1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 1]], bool)
    tiles, rims = Tiles.of(mask), list[Tensor]()
    Whole([], rims, 1, (3, 4)).near(layer, before, grow)
    made = Part([], rims, tiles).near(layer, tiles.gather(now), grow)
    seen = before.clone()
    tiles.scatter(tiles.gather(now), seen)
    whole = layer(F.interpolate(seen, scale_factor=grow) if grow > 1 else seen)
    torch.testing.assert_close(made, tiles.gather(whole))
    assert torch.equal(rims[0], cut_rims(seen, (3, 4)))


def test_all_tiles_are_the_dense_stream_bit_for_bit(stream: Direction) -> None:
    for _ in range(3):
        x = stream.draw(stream.count + 1)
        tiles = chosen(*range(COLUMNS))
        assert torch.equal(stream.choose(x, tiles), tiles.gather(stream.push(x)))


def test_a_change_with_all_that_it_reaches_is_the_dense_stream_there(stream: Direction) -> None:
    """Chunk after chunk, while what is held stands still."""
    still, tiles = stream.stand(), chosen(*range(REACHED))
    for _ in range(3):
        x = still.repeat(stream.count, 1, 1, 1)
        x[..., : stream.cells] = stream.draw(stream.count)[..., : stream.cells]
        whole = stream.push(x)
        near(stream.choose(x, tiles), tiles.gather(whole))


def test_where_nothing_changed_any_tiles_are_those_of_the_whole(stream: Direction) -> None:
    x = stream.stand().expand(stream.count, -1, -1, -1)
    whole = stream.push(x)
    for tiles in (chosen(4), chosen(0, 1, 5, 6), chosen(4)):
        near(stream.choose(x, tiles), tiles.gather(whole))
    near(stream.choose(x, None), stream.push(x))


def test_what_is_held_is_not_looked_at(stream: Direction) -> None:
    still, tiles, seen = stream.stand(), chosen(3), chosen(2, 3, 4)
    x, other = still.repeat(stream.count, 1, 1, 1), stream.draw(stream.count)
    wanted = stream.choose(x, tiles)
    seen.scatter(seen.gather(x), other)
    near(stream.choose(other, tiles), wanted)


def test_the_work_is_that_of_the_tiles_and_of_what_is_encoded_around_them(codec: TinyDecoder | TinyEncoder) -> None:
    stream = Direction(codec)
    x = stream.stand(1).expand(stream.count, -1, -1, -1)

    def work(tiles: Tiles | None) -> int:
        with FlopCounterMode(display=False) as counted:
            stream.choose(x, tiles)
        return counted.get_total_flops()

    computed = 2 if isinstance(codec, TinyDecoder) else 6
    assert work(chosen(2, 7)) * COLUMNS == work(None) * computed


def test_tiles_that_follow_no_whole_chunk_are_cut_from_one(stream: Direction) -> None:
    x, tiles = stream.draw(stream.count + 1), chosen(3)
    assert torch.equal(stream.choose(x, tiles), tiles.gather(stream.push(x)))


def test_after_plain_chunks_or_a_reset_nothing_is_remembered_of_tiles(codec: TinyDecoder | TinyEncoder) -> None:
    stream, memory = Direction(codec), codec.remember()
    x = stream.draw(stream.count + 1)
    for forget in (memory.forget_tiles, memory.reset):
        if isinstance(codec, TinyDecoder):
            codec.decode_tiles(memory, x, None)
        else:
            codec.encode_tiles(memory, x, None)
        assert memory.rims and memory.past
        forget()
        assert not memory.rims and not memory.glance
    assert not memory.past


def test_a_picture_of_broken_tiles_has_none() -> None:
    assert grid_of(torch.empty(3, 64, 96)) == (2, 3)
    assert grid_of(torch.empty(16, 8, 12), 8) == (2, 3)
    with pytest.raises(AssertionError, match="96x48"):
        grid_of(torch.empty(3, 48, 96))
    assert pays(chosen(0)) and not pays(chosen(*range(COLUMNS)))
