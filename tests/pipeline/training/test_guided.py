"""The teacher runs through a live stream's cache, is led by its words, and is read from its own checkpoint only."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.chunk import Controls
from pipeline.engine import Engine
from pipeline.errors import PipelineError
from pipeline.sampler import even_steps, with_steps
from pipeline.training.guided import GuidedTeacher, load_teacher
from pipeline.training.teacher import Denoiser


def guided(engine: Engine, **how: Any) -> GuidedTeacher:
    return GuidedTeacher(engine.config, engine.codec, engine.text, engine.student, **how)


def latents(model: Engine, prompts: list[str], seed: int = 3) -> np.ndarray:
    state = model.open(seed)
    return np.concatenate([model.step(state, Controls(prompt, seed)).latents_TCHW for prompt in prompts])


def test_steps_are_spaced_evenly_from_noise() -> None:
    assert even_steps(1) == (1000,)
    assert even_steps(4) == (1000, 750, 500, 250)
    assert even_steps(50) == tuple(range(1000, 0, -20))


@pytest.mark.parametrize("which", ["engine", "gated_engine"])
def test_one_unguided_step_is_what_a_live_stream_makes_of_one_pass(which: str, request: pytest.FixtureRequest) -> None:
    """Past the wrap of the ring, with a prompt change on the way."""
    engine: Engine = request.getfixturevalue(which)
    prompts = ["red ball"] * 4 + ["blue ball"] * 2
    live = Engine(with_steps(engine.config, 1), engine.codec, engine.text, engine.student)
    made = latents(guided(engine, steps=1, guidance=1.0), prompts)
    assert np.allclose(made, latents(live, prompts), atol=1e-4)


def test_guidance_leads_on_in_the_direction_of_the_words(engine: Engine) -> None:
    free, told, beyond = (latents(guided(engine, steps=1, guidance=by), ["red ball"]) for by in (0.0, 1.0, 2.0))
    assert not np.allclose(told, free, atol=1e-3)
    assert np.allclose(beyond - told, told - free, atol=1e-4)


def test_without_words_guidance_changes_nothing(engine: Engine) -> None:
    one, three = (latents(guided(engine, steps=3, guidance=by), ["", ""]) for by in (1.0, 3.0))
    assert np.allclose(one, three, atol=1e-4)


def test_more_steps_end_elsewhere_and_repeat_with_the_seed(engine: Engine) -> None:
    few, many = (latents(guided(engine, steps=steps), ["red ball"]) for steps in (2, 6))
    assert not np.allclose(few, many, atol=1e-3)
    assert np.array_equal(few, latents(guided(engine, steps=2), ["red ball"]))


@pytest.fixture
def checkpoint(engine: Engine, tmp_path: Path) -> Path:
    torch.manual_seed(4)
    denoiser = Denoiser(engine.config)
    denoiser.student.load_state_dict(engine.student.state_dict())
    denoiser.text.load_state_dict(engine.text.state_dict())
    path = tmp_path / "teacher" / "checkpoint.pt"
    path.parent.mkdir()
    torch.save({"name": "teacher", "ema": denoiser.state_dict(), "step": 7}, path)
    return path


def test_a_teacher_is_loaded_from_its_folder_or_its_file(engine: Engine, checkpoint: Path) -> None:
    there = latents(guided(engine, steps=50), ["red ball"])
    for path in (checkpoint, checkpoint.parent):
        assert np.array_equal(latents(load_teacher(path, engine), ["red ball"]), there)


def test_what_is_no_teacher_of_this_model_is_told_in_one_sentence(engine: Engine, checkpoint: Path) -> None:
    saved = torch.load(checkpoint, weights_only=True)
    key = next(iter(saved["ema"]))
    others = {
        "checkpoint_of_another_stage": {**saved, "name": "student"},
        "checkpoint_of_another_model": {**saved, "ema": {**saved["ema"], key: torch.zeros(1)}},
        "teacher_unreadable": {"weights": {}},
    }
    for code, payload in others.items():
        torch.save(payload, checkpoint)
        with pytest.raises(PipelineError) as refused:
            load_teacher(checkpoint, engine)
        assert refused.value.code == code
        assert str(checkpoint) in refused.value.message
    checkpoint.write_text("not a checkpoint")
    for path in (checkpoint, checkpoint.parent / "none.pt", checkpoint.parent.parent):
        with pytest.raises(PipelineError) as refused:
            load_teacher(path, engine)
        assert refused.value.code == "teacher_unreadable"


def test_what_a_gate_keeps_is_not_led_on_along_a_stream(open_gate: Engine) -> None:
    """Guided or not, a stream whose gate is open everywhere shows its first frame for ever."""
    led = latents(guided(open_gate, steps=3, guidance=3.0), ["red ball"] * 6)
    assert np.array_equal(led[1:], led[:1].repeat(len(led) - 1, 0))
