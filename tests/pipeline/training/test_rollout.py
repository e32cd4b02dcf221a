"""The rollout of training is the inference path, and gradients go where they should."""

import pytest
import torch

from pipeline.chunk import Controls
from pipeline.config import ModelConfig
from pipeline.engine import Engine
from pipeline.student import TextKV
from pipeline.training.rollout import roll_out

PROMPTS = ("red ball", "blue ball")


def texts_of(engine: Engine, prompts: tuple[str, ...]) -> TextKV:
    return engine.student.text_kv(engine.text(engine.text.tokenize(list(prompts))))


def test_a_rollout_of_many_streams_equals_each_live_stream(engine: Engine, config: ModelConfig) -> None:
    """Past the wrap of the ring, with a prompt change on the way."""
    with torch.no_grad():
        texts = [texts_of(engine, PROMPTS)] * 4 + [texts_of(engine, PROMPTS[::-1])] * 2
        chunks = roll_out(engine.student, texts, [3, 8], [len(config.sampler.steps)] * 6, config)
    for row, seed in enumerate((3, 8)):
        state = engine.open(seed)
        for index, chunk in enumerate(chunks):
            prompt = PROMPTS[row] if index < 4 else PROMPTS[1 - row]
            live = torch.from_numpy(engine.step(state, Controls(prompt, seed)).latents_TCHW)
            torch.testing.assert_close(chunk[row], live, atol=1e-4, rtol=1e-4)


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
