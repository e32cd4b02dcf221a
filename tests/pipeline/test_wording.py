"""New words come in at once, over chunks, or with the past rewritten as if the stream had always been under them."""

from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor

from pipeline.attention import CachedAttention, turns
from pipeline.chunk import Controls
from pipeline.config import CacheConfig, ModelConfig
from pipeline.engine import Engine
from pipeline.kv_cache import KVCache
from pipeline.student import Student
from pipeline.wording import PastLatents, Wording, recache

RED, BLUE = Controls("red ball"), Controls("blue ball")


def embedding(value: float) -> Tensor:
    return torch.full((1, 2, 3), float(value))


def test_a_glide_begins_beside_the_old_words_and_ends_exactly_at_the_new_ones() -> None:
    words, glide = Wording(), Controls("", transition="glide", glide_chunks=4)
    assert not words.take(embedding(1), glide)  # a first prompt has nothing to glide from
    assert words.advance() and not words.advance()
    target = embedding(5)
    assert not words.take(target, glide)
    seen = []
    for _ in range(4):
        assert words.advance()
        assert words.now_BLD is not None
        seen.append(float(words.now_BLD.mean()))
    assert seen == [2, 3, 4, 5]
    assert words.now_BLD is target
    assert not words.advance()


def test_a_prompt_in_the_middle_of_a_glide_goes_on_from_where_it_is() -> None:
    words, glide = Wording(), Controls("", transition="glide", glide_chunks=2)
    for value in (0, 4):
        words.take(embedding(value), glide)
        words.advance()
    assert words.now_BLD is not None and float(words.now_BLD.mean()) == 2
    words.take(embedding(6), glide)
    words.advance()
    assert float(words.now_BLD.mean()) == 4
    words.take(embedding(9), Controls("", transition="cut"))
    words.advance()
    assert float(words.now_BLD.mean()) == 9


def test_a_glide_of_one_chunk_is_a_cut(engine: Engine) -> None:
    made = []
    for controls in (replace(BLUE, transition="glide", glide_chunks=1), BLUE):
        state = engine.open(7)
        engine.step(state, RED)
        made.append(engine.step(state, controls).latents_TCHW)
    assert (made[0] == made[1]).all()


@pytest.mark.parametrize("keeps", [1, 0.6])
@pytest.mark.parametrize("chunks", [1, 2, 3, 7])
@pytest.mark.parametrize("rule", ["window", "stream"])
def test_a_rewritten_past_equals_a_run_from_scratch_on_the_same_latents(
    student: Student, config: ModelConfig, chunks: int, rule: Literal["window", "stream"], keeps: float
) -> None:
    """Also where the sink had taken in what left the window: it begins again with the stream's first frames."""
    config = replace(config, cache=CacheConfig(sink=2, window=4, positions=rule, sink_keeps=keeps))
    generator = torch.Generator().manual_seed(2)
    red, blue = (student.text_kv(torch.randn(1, 6, config.student.text_dim, generator=generator)) for _ in range(2))
    clip = torch.randn(1, 2 * chunks, 4, *config.latent_size, generator=generator)
    cache = KVCache.of(config)
    past = PastLatents(cache, (4, *config.latent_size), "cpu")
    push(student, config, cache, clip, red, past)
    recache(past, student, blue, config)

    # From scratch: the remembered frames are all there ever was, at the positions that they have now.
    kept = [*range(2), *range(max(2, 2 * chunks - 4), 2 * chunks)]
    assert cache.numbers() == kept
    fresh = KVCache.of(replace(config, cache=CacheConfig(sink=2, window=40)))
    places = cache.positions(0, 1000)
    for at in range(0, len(kept), 2):
        attend = CachedAttention(fresh, student, config.grid, 2)
        rows = turns(student.rope_rows(places[: at + 2], config.grid))
        split = at * config.tokens_per_frame
        attend.past_rows, attend.rows, attend.writing = rows[:split], rows[split:], True
        student.predict(clip[:, kept[at : at + 2]], 0.0, blue, attend)
        fresh.commit(2)
    for layer in range(config.student.num_layers):
        for ours, theirs in zip(cache.read(layer), fresh.read(layer), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def push(
    student: Student, config: ModelConfig, cache: KVCache, clip: Tensor, text: object, past: PastLatents | None = None
) -> None:
    for chunk in clip.split(config.chunk, 1):
        attend = CachedAttention(cache, student, config.grid, config.chunk)
        attend.writing = True
        student.predict(chunk, 0.0, text, attend)  # type: ignore[arg-type]
        cache.commit(config.chunk)
        if past is not None:
            past.keep(chunk[0])


def test_a_stream_that_is_rewritten_goes_on_as_one_that_was_always_under_the_new_words(
    engine: Engine, config: ModelConfig
) -> None:
    """While nothing has left the window, so that a whole stream can be compared."""
    state, other = engine.open(7), engine.open(7)
    for _ in range(2):
        engine.step(state, RED)
    assert state.past is not None and other.past is not None
    clip = state.past.read().clone()
    made = engine.step(state, replace(BLUE, transition="recache"))

    with torch.inference_mode():  # which chooses how attention is reckoned
        text = engine.student.text_kv(engine.text.embed(BLUE.prompt))
        push(engine.student, config, other.cache, clip[None], text)
    other.index = 2
    assert (made.latents_TCHW == engine.step(other, BLUE).latents_TCHW).all()
    cut = engine.open(7)
    for _ in range(2):
        engine.step(cut, RED)
    assert (made.latents_TCHW != engine.step(cut, BLUE).latents_TCHW).any()


def test_with_regions_a_glide_computes_all_until_it_has_arrived(engine: Engine) -> None:
    state, glide = engine.open(7), replace(RED, regions=0.5)
    for _ in range(4):
        engine.step(state, glide)
    blue = replace(glide, prompt="blue ball", transition="glide", glide_chunks=3)
    assert all(engine.step(state, blue).active_HW is None for _ in range(3))
