"""Teacher forcing says what a live stream would, gate and all."""

from dataclasses import replace

import pytest
import torch

from pipeline.chunk import Controls
from pipeline.config import ModelConfig
from pipeline.engine import Engine
from pipeline.sampler import draw_noise, mix, with_steps
from pipeline.training.forcing import per_frame, said

PROMPTS = ("red", "red", "blue", "blue")


def test_a_value_a_chunk_spreads_over_its_frames(config: ModelConfig) -> None:
    spread = per_frame(torch.tensor([[0.1, 0.9]]), config)
    assert spread.shape == (1, 4, 1, 1, 1)
    assert spread.flatten().tolist() == pytest.approx([0.1, 0.1, 0.9, 0.9])


@pytest.mark.parametrize(("which", "past_weight"), [("engine", 0.3), ("engine", 1.0), ("gated_engine", 1.0)])
def test_a_forced_clip_is_what_a_stream_of_one_pass_draws_where_its_prompt_changes(
    which: str, past_weight: float, request: pytest.FixtureRequest
) -> None:
    """On the stream's own past; in the first chunk under new words no gate lets the frame before through."""
    live: Engine = request.getfixturevalue(which)
    config = replace(live.config, cache=replace(live.config.cache, past_weight=past_weight))
    engine = Engine(with_steps(config, 1), live.codec, live.text, live.student)
    config, state = engine.config, engine.open(5)
    made = torch.cat(
        [torch.from_numpy(engine.step(state, Controls(prompt, 5)).latents_TCHW)[None] for prompt in PROMPTS], 1
    )
    size = (1, config.chunk, config.codec.latent_channels, *config.latent_size)
    noise = torch.cat([draw_noise(size, 5, index, 0) for index in range(len(PROMPTS))], 1)
    sigmas = torch.ones(1, len(PROMPTS))
    same_BK = torch.tensor([[False, True, False, True]])
    with torch.no_grad():
        text = engine.student.text_kv(engine.text(engine.text.tokenize(list(PROMPTS))))
        noisy = mix(made, noise, per_frame(sigmas, config))
        forced = said(engine.student, made, noisy, sigmas, text, config, None, same_BK)
        open_all = said(engine.student, made, noisy, sigmas, text, config)
    # The window of the tiny model holds all that is before these chunks.
    torch.testing.assert_close(forced, made, atol=1e-4, rtol=1e-4)
    differs = (open_all - forced).abs().amax((0, 2, 3, 4)) > 1e-3
    at = 2 * config.chunk
    assert not differs[:at].any() and not differs[at + config.chunk :].any()
    assert differs[at] == (which == "gated_engine")
