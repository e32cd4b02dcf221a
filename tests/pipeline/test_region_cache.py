"""Sparse passes against dense ones: a dense pass in which held tokens are seen as they are carried is the slow twin."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.attention import CachedAttention, attention, rotate, turns
from pipeline.config import ModelConfig, RegionConfig
from pipeline.kv_cache import KVCache
from pipeline.region_cache import RegionAttention, RegionCache, going_back
from pipeline.student import Student, TextKV
from pipeline.tiles import Tiles
from tests.pipeline.conftest import stir

MASK = np.array([[1, 0, 0], [1, 1, 0]], bool)
EVERY = np.ones_like(MASK)


@pytest.fixture(scope="module", params=[(1, 2, 2), (1, 1, 1)], ids=["token", "four tokens"])
def config(request: pytest.FixtureRequest, config: ModelConfig) -> ModelConfig:
    """One token a tile, as the pocket student has it, and four, as Wan has; both are told their places."""
    student = replace(config.student, patch_size=request.param, in_channels=32, position_channels=12)
    return replace(config, student=student)


@pytest.fixture(scope="module")
def student(config: ModelConfig) -> Student:
    torch.manual_seed(0)
    made = Student(config.student).eval().requires_grad_(False)
    stir(made, 0.2)
    return made


class Stream:
    """A stream's past, and what two passes of a chunk and its cache pass make of it."""

    def __init__(self, student: Student, config: ModelConfig, carry: str = "same_step") -> None:
        self.student, self.config = student, replace(config, regions=RegionConfig(carry))  # type: ignore[arg-type]
        self.cache, self.regions = KVCache.of(config), RegionCache(self.config)
        generator = torch.Generator().manual_seed(5)
        self.text: TextKV = student.text_kv(torch.randn(1, 6, 16, generator=generator))
        self.made = 0

    def attend(self) -> RegionAttention:
        return RegionAttention(self.cache, self.student, self.config.grid, self.config.chunk, self.regions, (0.9, 0.4))

    def draw(self, seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        size = (1, self.config.chunk)
        latents = torch.randn(*size, self.config.codec.latent_channels, *self.config.latent_size, generator=generator)
        return latents, torch.rand(*size, 16, *self.config.latent_size, generator=generator)

    def push(self, seed: int, tiles: Tiles | None = None, attend: CachedAttention | None = None) -> list[Tensor]:
        """Two denoise passes and a cache pass over drawn latents; what each puts out."""
        attend = attend or self.attend()
        if isinstance(attend, RegionAttention):
            attend.choose(tiles)
        latents, control = (tiles.gather(x) if tiles else x for x in self.draw(seed))
        out = []
        for step, level in enumerate((900.0, 400.0, 0.0)):
            attend.writing, attend.step = level == 0, step  # type: ignore[attr-defined]
            out.append(self.student(latents, torch.full((1, 1), level), self.text, attend, control, tiles))
        self.cache.commit(self.config.chunk)
        return out


@pytest.mark.parametrize("past_weight", [1.0, 0.3])
def test_all_tiles_chosen_equal_the_dense_pass_bit_for_bit(
    student: Student, config: ModelConfig, past_weight: float
) -> None:
    """With one token a tile the tokens stand in the same order; with four they are sums in another order."""
    cached = replace(config, cache=replace(config.cache, past_weight=past_weight))
    plain, sparse = Stream(student, cached), Stream(student, cached)
    tiles = Tiles.of(EVERY)
    for seed in range(4):
        dense = CachedAttention(plain.cache, student, config.grid, config.chunk)
        for one, other in zip(plain.push(seed, attend=dense), sparse.push(seed, tiles), strict=True):
            if config.student.patch_size == (1, 2, 2):
                assert torch.equal(tiles.gather(one), other)
            else:
                torch.testing.assert_close(tiles.gather(one), other, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sparse.cache.keys, plain.cache.keys, atol=1e-5, rtol=1e-5)


def test_remembering_changes_no_bit_of_a_dense_chunk(student: Student, config: ModelConfig) -> None:
    plain, other = Stream(student, config), Stream(student, config)
    for seed in range(3):
        dense = CachedAttention(plain.cache, student, config.grid, config.chunk)
        for one, two in zip(plain.push(seed, attend=dense), other.push(seed), strict=True):
            assert torch.equal(one, two)
    assert torch.equal(plain.cache.keys, other.cache.keys)
    assert torch.equal(plain.cache.values, other.cache.values)


class Substituted(CachedAttention):
    """The twin: every token is computed, and in each layer held tokens' keys and values are replaced before a look."""

    held: Tensor
    seen: Callable[[int, int], tuple[Tensor, Tensor] | None]  # (step, layer) -> keys, values (T, N, H, D)
    step = 0
    key_rows: Tensor | None = None  # rotations of the chunk's keys in denoise passes, if they are not the chunk's own

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        past_k, past_v = self.past(layer)
        k, v = (x.unflatten(1, (-1, self.tokens)).clone() for x in (k, v))
        seen = self.seen(self.step, layer)
        if seen is not None:
            k[0, :, self.held], v[0, :, self.held] = (x[:, self.held] for x in seen)
        if self.writing:
            self.cache.write(layer, k, v)
        mask = None
        if seen is None:
            hidden = torch.zeros(self.tokens, dtype=torch.bool)
            hidden[self.held] = True
            mask = ~torch.cat((torch.zeros(past_k.shape[1], dtype=torch.bool), hidden.repeat(k.shape[1])))[None]
        key_rows = self.rows if self.writing or self.key_rows is None else self.key_rows
        keys = torch.cat((past_k, rotate(k.flatten(1, 2), key_rows)), 1)
        return attention(rotate(q, self.rows), keys, torch.cat((past_v, v.flatten(1, 2)), 1), mask)


@pytest.mark.parametrize("carry", ["same_step", "own_time", "clean", "none"])
def test_chosen_tiles_equal_a_dense_pass_that_sees_held_tokens_as_they_are_carried(
    student: Student, config: ModelConfig, carry: str
) -> None:
    tiles, held = Tiles.of(MASK), Tiles.of(~MASK).tokens(config.grid)
    ours, twin = Stream(student, config, carry), Stream(student, config, carry)
    for seed in (0, 1):
        ours.push(seed)
        twin.push(seed)
    kept_k, kept_v = twin.regions.keys[:, :, 0].clone(), twin.regions.values[:, :, 0].clone()
    for seed in (2, 3):  # twice: the second stands on what the first wrote
        newest = [tuple(x[0].expand(2, -1, -1, -1).clone() for x in twin.cache.newest(layer)) for layer in range(2)]

        def seen(step: int, layer: int, newest: list[tuple[Tensor, ...]] = newest) -> tuple[Tensor, Tensor] | None:
            if step == 2 or carry == "clean":
                return newest[layer][0], newest[layer][1]
            return None if carry == "none" else (kept_k[step, layer], kept_v[step, layer])

        attend = Substituted(twin.cache, student, config.grid, config.chunk)
        attend.held, attend.seen = held, seen
        if carry == "own_time":  # of the second chunk, frames 2 and 3, whichever chunk is being made
            ours.regions.age_HW[~MASK] = seed - 2
            then = turns(student.rope_rows([2, 3], config.grid)).unflatten(0, (2, -1))
            attend.key_rows = attend.rows.unflatten(0, (2, -1)).clone()
            attend.key_rows[:, held] = then[:, held]
            attend.key_rows = attend.key_rows.flatten(0, 1)
        for one, other in zip(twin.push(seed, attend=attend), ours.push(seed, tiles), strict=True):
            torch.testing.assert_close(tiles.gather(one), other, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.cache.keys, twin.cache.keys, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.cache.values, twin.cache.values, atol=1e-5, rtol=1e-5)


def test_no_frame_goes_back_before_the_oldest_that_can_be() -> None:
    assert going_back([6, 7]) == [[6, 7], [4, 5], [2, 3], [0, 1]]
    assert going_back([5, 6, 7]) == [[5, 6, 7], [2, 3, 4], [0, 1, 2]]
    assert going_back([0, 1]) == [[0, 1]]


def test_the_ring_has_a_held_token_as_it_was_last_computed_once_for_each_frame(
    student: Student, config: ModelConfig
) -> None:
    stream, tiles = Stream(student, config), Tiles.of(MASK)
    stream.push(0)
    held = Tiles.of(~MASK).tokens(config.grid)
    before = stream.cache.keys[:, :, 1, held].clone()
    stream.push(1, tiles)
    stream.push(2, tiles)
    for slot in stream.cache.slots()[2:]:
        assert torch.equal(stream.cache.keys[:, :, slot, held], before)


def test_held_latents_and_pixels_stay_to_the_bit_and_active_ones_are_replaced(config: ModelConfig) -> None:
    regions, tiles = RegionCache(config), Tiles.of(MASK)
    first, second = torch.rand(2, 1, 2, 4, 4, 6)
    assert regions.keep(first, None) is first
    whole = regions.keep(tiles.gather(second), tiles)
    held = Tiles.of(~MASK)
    for frame in range(2):
        assert torch.equal(held.gather(whole[0, frame]), held.gather(first[0, -1]))
    assert torch.equal(tiles.gather(whole), tiles.gather(second))

    old, new = torch.randint(0, 256, (2, 8, 3, 64, 96), dtype=torch.uint8)
    regions.show(old, None)
    shown = regions.show(tiles.gather(new), tiles)
    assert torch.equal(shown[..., 32:56, 0:24], new[..., 32:56, 0:24])
    assert torch.equal(held.gather(shown), held.gather(old[-1]).expand(8, -1, -1, -1))


def test_a_computed_tile_blends_into_a_held_one_and_a_faded_one_comes_in_picture_by_picture(
    config: ModelConfig,
) -> None:
    regions, left = RegionCache(config), np.array([[1, 1, 0], [1, 1, 0]], bool)
    regions.show(torch.zeros(8, 3, 64, 96, dtype=torch.uint8), None)
    bright = torch.full((8, 3, 64, 96), 200, dtype=torch.uint8)
    faded = np.array([[1, 0, 0], [0, 0, 0]], bool)
    shown = regions.show(Tiles.of(left).gather(bright), Tiles.of(left), Tiles.of(faded))
    row = shown[0, 0, 50].int()
    assert (row[:56] == 200).all()
    assert (row[64:] == 0).all()
    assert (row[56:64].diff() < 0).all()
    assert shown[:, 0, 10, 10].tolist() == [25, 50, 75, 100, 125, 150, 175, 200]


def test_what_moved_up_to_a_tiles_border_does_not_blend_with_what_was_there(config: ModelConfig) -> None:
    regions, left = RegionCache(config), np.array([[1, 1, 0], [1, 1, 0]], bool)
    regions.show(torch.zeros(8, 3, 64, 96, dtype=torch.uint8), None)
    bright, moved = torch.full((8, 3, 64, 96), 200, dtype=torch.uint8), torch.zeros(16, 24, dtype=torch.bool)
    moved[5:8, 14:18] = True
    shown = regions.show(Tiles.of(left).gather(bright), Tiles.of(left), moved_HW=moved)
    assert (shown[:, :, 20:32, 56:64] == 200).all()
    assert (shown[:, :, :20, 60:64] < 200).all()
    assert (shown[..., 64:] == 0).all()


def test_a_tile_ages_while_it_is_held(config: ModelConfig) -> None:
    regions, clean = RegionCache(config), torch.zeros(1, 2, 4, 4, 6)
    regions.keep(clean, None)
    for _ in range(3):
        regions.keep(Tiles.of(MASK).gather(clean), Tiles.of(MASK))
    assert regions.age_HW.tolist() == [[0, 3, 3], [0, 0, 3]]
    regions.keep(clean, None)
    assert not regions.age_HW.any()


def test_a_past_that_was_forgotten_and_one_that_weighs_less_go_together(student: Student, config: ModelConfig) -> None:
    config = replace(config, cache=replace(config.cache, past_weight=0.3))
    stream, gone = Stream(student, config), Tiles.of(MASK)
    for seed in range(2):
        stream.push(seed)
    stream.regions.forget(gone.tokens(config.grid), stream.cache.written)
    attend, tokens = stream.attend(), config.tokens_per_frame
    q, k, v = torch.randn(3, 1, config.chunk * tokens, *stream.cache.keys.shape[-2:])
    attend.writing = True  # nothing is carried then
    with torch.no_grad():
        made = attend(1, q, k, v)
        past_k, past_v = CachedAttention.read(attend, 1)
    kept = torch.ones(tokens, dtype=torch.bool).index_fill(0, gone.tokens(config.grid), False)
    weights = torch.full((stream.cache.frames, tokens), 0.3)
    weights[: config.cache.sink] = 1
    weights[:, ~kept] = 0
    keys, values = torch.cat((past_k, rotate(k, attend.rows)), 1), torch.cat((past_v, v), 1)
    scores = torch.einsum("bqhd,bkhd->bhqk", rotate(q, attend.rows), keys) * q.shape[-1] ** -0.5
    shares = scores.exp() * torch.cat((weights.flatten(), torch.ones(k.shape[1])))
    wanted = torch.einsum("bhqk,bkhd->bqhd", shares / shares.sum(-1, keepdim=True), values)
    torch.testing.assert_close(made, wanted, atol=1e-5, rtol=1e-5)
