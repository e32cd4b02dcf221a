"""A ring with a sink: what is remembered, in which order, and that nothing else is ever read."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import CacheConfig
from pipeline.kv_cache import KVCache


def make(sink: int = 2, window: int = 4) -> KVCache:
    cache = KVCache(CacheConfig(sink=sink, window=window), layers=2, tokens=3, heads=1, head_dim=2)
    cache.keys.fill_(float("nan"))
    cache.values.fill_(float("nan"))
    return cache


def push(cache: KVCache, *frames: float) -> None:
    block = torch.tensor(frames)[None, :, None, None, None].expand(1, -1, 3, 1, 2)
    for layer in range(2):
        cache.write(layer, block, -block)
    cache.commit(len(frames))


def seen(cache: KVCache) -> list[float]:
    keys, values = cache.read(1)
    assert torch.equal(keys, -values)
    return keys[0, :, 0, 0, 0].tolist()


def test_cells_never_written_are_never_read() -> None:
    cache = make()
    assert cache.read(0)[0].shape[1] == 0
    push(cache, 0, 1)
    assert seen(cache) == [0, 1]
    push(cache, 2)
    assert seen(cache) == [0, 1, 2]


def test_after_the_wrap_the_sink_stays_and_the_window_is_in_order_of_age() -> None:
    cache = make()
    for start in range(0, 14, 2):
        push(cache, start, start + 1)
    assert seen(cache) == [0, 1, 10, 11, 12, 13]
    assert cache.frames == 6


def test_a_cache_without_a_sink_is_a_plain_window() -> None:
    cache = make(sink=0, window=3)
    push(cache, 0, 1)
    push(cache, 2, 3)
    assert seen(cache) == [1, 2, 3]


@given(sink=st.integers(0, 3), window=st.integers(1, 5), sizes=st.lists(st.integers(1, 4), max_size=8))
def test_whatever_the_sizes_the_past_is_the_sink_and_the_newest_window(
    sink: int, window: int, sizes: list[int]
) -> None:
    cache, frames = make(sink, window), list(range(sum(sizes)))
    place = 0
    for size in sizes:
        push(cache, *frames[place : place + size])
        place += size
        so_far = frames[:place]
        assert seen(cache) == so_far[:sink] + so_far[sink:][-window:]
        assert cache.frames == len(cache.slots()) == len(seen(cache))


def moving(keeps: float = 0.5) -> KVCache:
    cache = KVCache(CacheConfig(sink=2, window=3, sink_keeps=keeps), layers=2, tokens=3, heads=1, head_dim=2)
    push(cache, 0, 1)
    push(cache, 10, 20, 30)
    return cache


def test_a_sink_that_moves_takes_in_what_leaves_the_window_each_frame_in_its_turn() -> None:
    cache = moving()
    assert seen(cache) == [0, 1, 10, 20, 30]
    push(cache, 40)
    assert seen(cache) == [5, 1, 20, 30, 40]
    push(cache, 50, 60)
    assert seen(cache) == [(5 + 30) / 2, (1 + 20) / 2, 40, 50, 60]
    assert seen(moving(keeps=1.0))[:2] == [0, 1]


def test_what_is_written_again_before_it_is_counted_moves_the_sink_once() -> None:
    cache, block = moving(), torch.full((1, 1, 3, 1, 2), 40.0)
    cache.write(1, block, -block)  # a chunk whose last pass has to be run again
    push(cache, 40)
    assert seen(cache) == [5, 1, 20, 30, 40]
    before = cache.keys[0, :, :2].clone()
    cache.write(0, block, -block, place=2)  # a past that is rewritten leaves nothing behind
    assert torch.equal(cache.keys[0, :, :2], before)
    cache.reset()
    push(cache, 0, 1)
    push(cache, 10, 20, 30)
    push(cache, 40)
    assert seen(cache) == [5, 1, 20, 30, 40]


def test_reset_forgets_everything() -> None:
    cache = make()
    push(cache, 0, 1)
    cache.reset()
    assert cache.frames == 0
    assert cache.slots() == []


def test_streams_of_a_batch_keep_apart() -> None:
    cache = KVCache(CacheConfig(sink=1, window=2), layers=1, tokens=3, heads=1, head_dim=2, batch=2)
    for frame in range(5):
        block = torch.tensor([frame, frame + 100.0])[:, None, None, None, None].expand(2, 1, 3, 1, 2)
        cache.write(0, block, -block)
        cache.commit(1)
    keys, values = cache.read(0)
    assert keys.shape == (2, 3, 3, 1, 2)
    assert keys[:, :, 0, 0, 0].tolist() == [[0, 3, 4], [100, 103, 104]]
    assert torch.equal(keys, -values)
