"""The rollout of training is the inference path, and gradients go where they should."""

import numpy as np
import pytest
import torch

from pipeline.chunk import Controls
from pipeline.config import ModelConfig
from pipeline.engine import Engine
from pipeline.region_cache import RegionCache
from pipeline.student import TextKV
from pipeline.training.rollout import roll_out, roll_out_clip

PROMPTS = ("red ball", "blue ball")


def texts_of(engine: Engine, prompts: tuple[str, ...]) -> TextKV:
    return engine.student.text_kv(engine.text(engine.text.tokenize(list(prompts))))


@pytest.fixture(params=["engine", "gated_engine", "anchored_engine"])
def live(request: pytest.FixtureRequest) -> Engine:
    found: Engine = request.getfixturevalue(request.param)
    return found


def test_a_rollout_of_many_streams_equals_each_live_stream(live: Engine) -> None:
    """Past the wrap of the ring, with a prompt change on the way."""
    engine, config = live, live.config
    with torch.no_grad():
        texts = [texts_of(engine, PROMPTS)] * 4 + [texts_of(engine, PROMPTS[::-1])] * 2
        same_BK = torch.arange(6).ne(4).expand(2, -1)
        chunks = roll_out(engine.student, texts, [3, 8], [len(config.sampler.steps)] * 6, config, (), same_BK)
    for row, seed in enumerate((3, 8)):
        state = engine.open(seed)
        for index, chunk in enumerate(chunks):
            prompt = PROMPTS[row] if index < 4 else PROMPTS[1 - row]
            live = torch.from_numpy(engine.step(state, Controls(prompt, seed)).latents_TCHW)
            torch.testing.assert_close(chunk[row], live, atol=1e-4, rtol=1e-4)


def test_a_rollout_with_held_tiles_equals_a_live_stream_that_holds_them(live: Engine) -> None:
    """The live stream's own masks: dense until it is warm, then what was painted."""
    engine, config = live, live.config
    painted = Controls(PROMPTS[0], 3, regions=0.5, paint="001" + "011")
    state, made = engine.open(3), []
    for _ in range(7):
        made.append(engine.step(state, painted))
    masks = [chunk.active_HW for chunk in made]
    assert masks[0] is None or masks[0].all()
    assert sum(mask is not None and 0 < mask.sum() < mask.size for mask in masks) >= 3
    masks = [None if mask is None or mask.all() else mask for mask in masks]
    with torch.no_grad():
        texts = [texts_of(engine, PROMPTS)] * 7
        chunks = roll_out(engine.student, texts, [3, 8], [len(config.sampler.steps)] * 7, config, masks)
    for chunk, seen in zip(chunks, made, strict=True):
        torch.testing.assert_close(chunk[0], torch.from_numpy(seen.latents_TCHW), atol=1e-4, rtol=1e-4)


def test_new_words_reach_held_tiles_when_their_turn_comes_in_a_rollout_as_in_a_live_stream(
    gated_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A live stream forgets the past of painted tiles as well, which is a viewer's wish and not done here."""
    monkeypatch.setattr(RegionCache, "forget", lambda *_: None)
    engine, config, painted = gated_engine, gated_engine.config, "001" + "011"
    controls = [Controls(PROMPTS[0], 3, paint=painted)] * 5
    controls += [Controls(PROMPTS[1], 3, paint=painted)] * 2 + [Controls(PROMPTS[1], 3)]
    state = engine.open(3)
    made = [engine.step(state, each) for each in controls]
    masks = [None if each.active_HW is None or each.active_HW.all() else each.active_HW for each in made]
    assert masks[5] is not None and masks[7] is None
    with torch.no_grad():
        texts = [texts_of(engine, (each.prompt,) * 2) for each in controls]
        passes, same_BK = [len(config.sampler.steps)] * 8, torch.arange(8).ne(5).expand(2, -1)
        chunks, kept = (
            roll_out(engine.student, texts, [3, 8], passes, config, masks, same) for same in (same_BK, None)
        )
    for chunk, seen in zip(chunks, made, strict=True):
        torch.testing.assert_close(chunk[0], torch.from_numpy(seen.latents_TCHW), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(chunks[7], kept[7], atol=1e-3)


def test_what_is_held_has_no_gradient_and_what_is_computed_has(engine: Engine, config: ModelConfig) -> None:
    mask = np.array([[True, False, False], [False, False, False]])
    head = engine.student.model.proj_out.weight.requires_grad_(True)
    try:
        with torch.enable_grad():
            texts = [texts_of(engine, PROMPTS)] * 3
            chunks = roll_out(engine.student, texts, [3, 8], [2, 2, 2], config, [None, mask, mask])
            gradients = [
                torch.autograd.grad(part.sum(), head, retain_graph=True, allow_unused=True)[0]
                for part in (chunks[2][..., :2, :2], chunks[2][..., 2:, :])
            ]
        assert gradients[0] is not None and gradients[0].abs().sum() > 0
        assert gradients[1] is None or gradients[1].abs().sum() == 0
        assert torch.equal(chunks[1][:, -1, :, 2:], chunks[2][:, 0, :, 2:])
    finally:
        head.requires_grad_(False)


@pytest.mark.parametrize("passes", [[1, 2], [4, 1]])
def test_only_the_last_pass_of_each_chunk_carries_the_gradient(
    engine: Engine, config: ModelConfig, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    learning = []
    forward = engine.student.forward

    def watched(*args: object) -> torch.Tensor:
        learning.append(torch.is_grad_enabled())
        return forward(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(engine.student, "forward", watched)
    with torch.enable_grad():
        texts = [texts_of(engine, PROMPTS)] * 2
        roll_out(engine.student, texts, [3, 8], passes, config)
    expected = []
    for count in passes:
        expected += [False] * (count - 1) + [True, False]  # the cache pass comes last
    assert learning == expected


def test_a_rolled_clip_is_the_sink_and_the_newest_chunks_of_a_longer_stream(live: Engine) -> None:
    config, prompts = live.config, [*PROMPTS, PROMPTS[1], PROMPTS[0]]
    passes = [len(config.sampler.steps)] * 7
    with torch.no_grad():
        words = live.text(live.text.tokenize(prompts * 2))
        same_BK = torch.tensor([[False, False, True, False]]).expand(2, -1)
        clip = roll_out_clip(live.student, words, [3, 8], passes, 3, config, (), same_BK)
    state, chunks = live.open(8), []
    for prompt in (prompts[0], *[prompts[1]] * 4, *prompts[2:]):
        chunks.append(torch.from_numpy(live.step(state, Controls(prompt, 8)).latents_TCHW))
    torch.testing.assert_close(clip[1], torch.cat([chunks[0], *chunks[4:]]), atol=1e-4, rtol=1e-4)
