"""Forty chunks through the cache against a list that forgets nothing, for both ways to count and to store positions."""

from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor

from pipeline.attention import CachedAttention, attention, rotate
from pipeline.config import CacheConfig, ModelConfig
from pipeline.kv_cache import KVCache
from pipeline.student import Student
from tests.pipeline.conftest import stir

CHUNKS, TABLE = 40, 24


class Everything:
    """All keys and values there ever were; each look picks the frames that the rule names, one by one."""

    def __init__(self, student: Student, config: ModelConfig) -> None:
        self.student, self.config = student, config
        self.frames: list[dict[int, tuple[Tensor, Tensor]]] = []
        self.own: dict[int, tuple[Tensor, Tensor]] = {}

    def places(self, chunk: int) -> tuple[list[int], list[int]]:
        """Numbers and positions of what a chunk looks at, itself last."""
        cache, now = self.config.cache, len(self.frames)
        past = [number for number in range(now) if number < cache.sink or number >= now - cache.window]
        numbers = past + list(range(now, now + chunk))
        if cache.positions == "window":
            return numbers, list(range(len(numbers)))
        over = max(0, now + chunk - self.config.student.rope_max_seq_len)
        return numbers, [number if number < cache.sink else number - over for number in numbers]

    def read(self, number: int, layer: int) -> tuple[Tensor, Tensor]:
        """A frame's keys and values; of a sink that moves, averaged with all that have left the window, one by one."""
        cache, (key, value) = self.config.cache, self.frames[number][layer]
        if number < cache.sink and cache.sink_keeps < 1:
            for left in range(cache.sink, len(self.frames) - cache.window):
                if left % cache.sink == number:
                    old_key, old_value = self.frames[left][layer]
                    key = cache.sink_keeps * key + (1 - cache.sink_keeps) * old_key
                    value = cache.sink_keeps * value + (1 - cache.sink_keeps) * old_value
        return key, value

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tokens, chunk = self.config.tokens_per_frame, self.config.chunk
        self.own[layer] = (k, v)
        numbers, positions = self.places(chunk)
        keys, values, queries = [], [], []
        for number, position in zip(numbers, positions, strict=True):
            row = self.student.rope_rows([position], self.config.grid)
            own = number - len(self.frames)
            part = slice(own * tokens, (own + 1) * tokens)
            key, value = self.read(number, layer) if own < 0 else (k[:, part], v[:, part])
            keys.append(rotate(key, row))
            values.append(value)
            if own >= 0:
                queries.append(rotate(q[:, part], row))
        return attention(torch.cat(queries, 1), torch.cat(keys, 1), torch.cat(values, 1))

    def commit(self) -> None:
        tokens = self.config.tokens_per_frame
        for offset in range(self.config.chunk):
            part = slice(offset * tokens, (offset + 1) * tokens)
            self.frames.append({layer: (k[:, part], v[:, part]) for layer, (k, v) in self.own.items()})


class RotatedOnce(Everything):
    """The published way to store, as Self-Forcing has it: a key is rotated when it is made, by its frame's place in the
    stream, and stays so. It ends where the table does."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        now, chunk = len(self.frames), self.config.chunk
        row = self.student.rope_rows(list(range(now, now + chunk)), self.config.grid)
        self.own[layer] = (rotate(k, row), v)
        past = [self.frames[number][layer] for number in self.places(chunk)[0] if number < now]
        keys, values = zip(*past, self.own[layer], strict=True)
        return attention(rotate(q, row), torch.cat(keys, 1), torch.cat(values, 1))


def compare(config: ModelConfig, cache_config: CacheConfig, chunk: int, table: int, *kinds: type[Everything]) -> None:
    """Forty chunks, each drawn and written, through the cache and through each of the references."""
    shape = replace(config.student, in_channels=4, control_channels=0, rope_max_seq_len=table)
    config = replace(config, student=shape, chunk=chunk, cache=cache_config)
    torch.manual_seed(0)
    student = Student(shape).eval().requires_grad_(False)
    stir(student, 0.2)
    generator = torch.Generator().manual_seed(1)
    text = student.text_kv(torch.randn(1, 6, shape.text_dim, generator=generator))
    cache, references = KVCache.of(config), [kind(student, config) for kind in kinds]
    for index in range(CHUNKS):
        latents = torch.randn(1, chunk, 4, *config.latent_size, generator=generator)
        attend = CachedAttention(cache, student, config.grid, chunk)
        ours = student.predict(latents, 0.7, text, attend)
        for naive in references:
            theirs, told = student.predict(latents, 0.7, text, naive), f"chunk {index}, {type(naive).__name__}"
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5, msg=told)
        attend.writing = True
        student.predict(latents, 0.0, text, attend)
        cache.commit(chunk)
        for naive in references:
            student.predict(latents, 0.0, text, naive)
            naive.commit()


@pytest.mark.parametrize("positions", ["window", "stream"])
@pytest.mark.parametrize(
    ("sink", "window", "chunk", "keeps"),
    [(3, 6, 3, 1), (0, 5, 1, 1), (2, 3, 2, 1), (3, 3, 3, 0.6), (2, 3, 2, 0.8)],
)
def test_forty_chunks_equal_a_list_that_forgets_nothing(
    config: ModelConfig, positions: Literal["window", "stream"], sink: int, window: int, chunk: int, keeps: float
) -> None:
    cache = CacheConfig(sink=sink, window=window, positions=positions, sink_keeps=keeps)
    compare(config, cache, chunk, TABLE, Everything)


@pytest.mark.parametrize(("sink", "window", "chunk"), [(3, 6, 3), (0, 5, 1), (2, 3, 2)])
def test_below_the_end_of_the_table_keys_that_were_rotated_once_and_keys_rotated_at_each_look_draw_the_same(
    config: ModelConfig, sink: int, window: int, chunk: int
) -> None:
    cache = CacheConfig(sink=sink, window=window, positions="stream")
    compare(config, cache, chunk, CHUNKS * chunk, Everything, RotatedOnce)


def test_the_two_ways_differ_only_once_there_is_a_gap_behind_the_sink() -> None:
    def positions(rule: Literal["window", "stream"], written: int, limit: int = 1000) -> list[int]:
        cache = KVCache(CacheConfig(sink=2, window=3, positions=rule), layers=1, tokens=1, heads=1, head_dim=2)
        cache.commit(written)
        return cache.positions(1, limit)

    assert positions("stream", 5) == positions("window", 5) == [0, 1, 2, 3, 4, 5]
    assert positions("window", 9) == [0, 1, 2, 3, 4, 5]
    assert positions("stream", 9) == [0, 1, 6, 7, 8, 9]
    assert positions("stream", 90, limit=12) == [0, 1, 8, 9, 10, 11]
