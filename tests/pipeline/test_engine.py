"""The one verb: what a step returns, remembers and refuses, on the tiny model."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pipeline.chunk import Chunk, Controls
from pipeline.codec import CodecMemory, PocketCodec, frames_to_pixels, pixels_to_frames
from pipeline.config import ModelConfig, WanModel
from pipeline.engine import Engine
from pipeline.errors import PipelineError
from pipeline.state import StreamState
from pipeline.student import Student
from pipeline.text import TextEncoder
from tests.pipeline.published import peft_lora

RED = Controls(prompt="red ball")


def run(engine: Engine, state: StreamState, *controls: Controls) -> list[Chunk]:
    return [engine.step(state, each) for each in controls]


def same(one: list[Chunk], other: list[Chunk]) -> bool:
    """Bit for bit."""
    return len(one) == len(other) and all(
        np.array_equal(a.latents_TCHW, b.latents_TCHW) and np.array_equal(a.frames_THWC, b.frames_THWC)
        for a, b in zip(one, other, strict=True)
    )


def camera(config: ModelConfig, seed: int = 0) -> np.ndarray:
    shape = (config.frames_per_chunk, config.height, config.width, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_a_step_returns_a_chunk_of_rgb_bytes_and_the_latents_they_came_from(
    engine: Engine, config: ModelConfig, codec: PocketCodec
) -> None:
    state = engine.open(7)
    chunks = run(engine, state, replace(RED, epoch=3), replace(RED, epoch=4))
    assert [(chunk.index, chunk.epoch) for chunk in chunks] == [(0, 3), (1, 4)]
    for chunk in chunks:
        assert chunk.frames_THWC.shape == (8, 64, 96, 3)
        assert chunk.frames_THWC.dtype == np.uint8
        assert chunk.latents_TCHW.shape == (2, 4, 4, 6)
        assert chunk.latents_TCHW.dtype == np.float32
        assert np.isfinite(chunk.latents_TCHW).all()
    clip = torch.from_numpy(np.concatenate([chunk.latents_TCHW for chunk in chunks]))
    pixels = frames_to_pixels(codec.decode(clip[None])[0]).numpy().astype(int)
    made = np.concatenate([chunk.frames_THWC for chunk in chunks]).astype(int)
    assert np.abs(made - pixels).max() <= 1


def test_the_same_seed_and_prompt_make_the_same_stream(engine: Engine) -> None:
    assert same(run(engine, engine.open(7), RED, RED, RED), run(engine, engine.open(7), RED, RED, RED))


@pytest.mark.parametrize("other", [replace(RED, seed=8), replace(RED, prompt="blue ball")])
def test_another_seed_or_prompt_makes_another_stream(engine: Engine, other: Controls) -> None:
    ours = run(engine, engine.open(7), RED, RED)
    theirs = run(engine, engine.open(other.seed), other, other)
    for one, two in zip(ours, theirs, strict=True):
        assert np.abs(one.latents_TCHW - two.latents_TCHW).max() > 1e-3


def test_each_chunk_draws_its_own_noise_and_sees_its_past(engine: Engine) -> None:
    first, second, _ = run(engine, engine.open(7), RED, RED, RED)
    assert not np.array_equal(first.latents_TCHW, second.latents_TCHW)
    other_past = engine.open(7)
    engine.step(other_past, replace(RED, prompt="blue"))
    assert not np.array_equal(engine.step(other_past, RED).latents_TCHW, second.latents_TCHW)


def test_a_reset_stream_equals_a_fresh_one(engine: Engine, config: ModelConfig, codec: PocketCodec) -> None:
    used, fresh = engine.open(3), engine.open(7)
    blue = Controls("blue", seed=3)
    for _ in range(5):
        engine.step(used, blue, camera(config))
    codec.encode_push(used.encoder, pixels_to_frames(torch.from_numpy(camera(config)[:3])))
    engine.reset(used, 7)
    assert used.encoder == CodecMemory()
    made = [[engine.step(state, RED, source) for source in (None, camera(config), None)] for state in (used, fresh)]
    assert same(*made)


def test_a_reset_stream_never_reads_what_it_remembered(engine: Engine) -> None:
    state = engine.open(7)
    run(engine, state, RED, RED)
    engine.reset(state, 7)
    state.cache.keys.fill_(float("nan"))
    state.cache.values.fill_(float("nan"))
    assert same(run(engine, state, RED, RED), run(engine, engine.open(7), RED, RED))


def test_two_interleaved_streams_equal_the_two_run_alone(engine: Engine, config: ModelConfig) -> None:
    blue, frames = Controls("blue ball", seed=9), camera(config)
    one, two = engine.open(7), engine.open(9)
    ours, theirs = [], []
    for _ in range(4):
        ours.append(engine.step(one, RED))
        theirs.append(engine.step(two, blue, frames))
    assert same(ours, run(engine, engine.open(7), *[RED] * 4))
    alone = engine.open(9)
    assert same(theirs, [engine.step(alone, blue, frames) for _ in range(4)])


def test_a_new_seed_starts_the_stream_again(engine: Engine) -> None:
    state = engine.open(7)
    run(engine, state, RED, RED)
    other = replace(RED, seed=8)
    again = run(engine, state, other, other)
    assert [chunk.index for chunk in again] == [0, 1]
    assert same(again, run(engine, engine.open(8), other, other))


def test_pause_and_epoch_do_not_touch_the_picture(engine: Engine) -> None:
    changed = replace(RED, epoch=5, paused=True)
    assert same(run(engine, engine.open(7), RED, changed), run(engine, engine.open(7), RED, RED))


def test_strength_zero_shows_the_source_as_the_codec_sees_it(
    engine: Engine, config: ModelConfig, codec: PocketCodec
) -> None:
    frames = camera(config)
    chunk = engine.step(engine.open(7), replace(RED, strength=0.0), frames)
    latents = codec.encode(pixels_to_frames(torch.from_numpy(frames))[None])
    np.testing.assert_allclose(chunk.latents_TCHW, latents[0].numpy(), atol=1e-5)
    pixels = frames_to_pixels(codec.decode_push(CodecMemory(), latents[0])).numpy()
    assert np.abs(chunk.frames_THWC.astype(int) - pixels.astype(int)).max() <= 1


def test_strength_one_ignores_the_source(engine: Engine, config: ModelConfig) -> None:
    wild = replace(RED, strength=1.0)
    made = [engine.step(engine.open(7), wild, source) for source in (None, camera(config, 0), camera(config, 1))]
    assert same(made[:1], made[1:2])
    assert same(made[:1], made[2:])


def test_a_weaker_strength_stays_nearer_to_the_source(engine: Engine, config: ModelConfig, codec: PocketCodec) -> None:
    frames = camera(config)
    source = codec.encode(pixels_to_frames(torch.from_numpy(frames))[None])[0].numpy()
    away = [
        float(np.abs(engine.step(engine.open(7), replace(RED, strength=at), frames).latents_TCHW - source).mean())
        for at in (0.0, 0.1, 0.6, 1.0)
    ]
    assert away == sorted(away)


def test_structure_keeps_to_the_outlines_of_the_source_in_every_pass(engine: Engine, config: ModelConfig) -> None:
    """At strength 1 nothing of the source comes in but its structure."""
    frames = camera(config)
    free, half, whole = (
        engine.step(engine.open(7), replace(RED, strength=1.0, structure=at), frames) for at in (0.0, 0.5, 1.0)
    )
    assert not np.array_equal(free.latents_TCHW, half.latents_TCHW)
    assert not np.array_equal(half.latents_TCHW, whole.latents_TCHW)
    assert same([free], [engine.step(engine.open(7), RED, None)])
    assert same([free], [engine.step(engine.open(7), replace(RED, structure=1.0), None)])
    brighter = np.minimum(frames.astype(int) + 3, 255).astype(np.uint8)
    other = engine.step(engine.open(7), replace(RED, strength=1.0, structure=1.0), brighter)
    np.testing.assert_allclose(other.latents_TCHW, whole.latents_TCHW, atol=0.05)


def test_a_model_that_knows_no_structure_draws_without_it(
    config: ModelConfig, codec: PocketCodec, text: TextEncoder
) -> None:
    bare = replace(config, student=replace(config.student, in_channels=4, control_channels=0))
    torch.manual_seed(0)
    engine = Engine(bare, codec, text, Student(bare.student).eval().requires_grad_(False))
    with_it, without = (engine.step(engine.open(7), replace(RED, structure=at), camera(config)) for at in (1.0, 0.0))
    assert same([with_it], [without])


def test_the_source_may_come_and_go(engine: Engine, config: ModelConfig) -> None:
    state = engine.open(7)
    sources = (None, camera(config), None, camera(config, 1))
    made = [engine.step(state, RED, source) for source in sources]
    assert [chunk.index for chunk in made] == [0, 1, 2, 3]
    assert all(np.isfinite(chunk.latents_TCHW).all() for chunk in made)
    assert not np.array_equal(made[1].latents_TCHW, run(engine, engine.open(7), RED, RED)[1].latents_TCHW)


def test_the_text_is_read_again_only_when_the_prompt_changes(engine: Engine) -> None:
    state = engine.open(7)
    seen = []
    for prompt in ("red", "red", "blue", "blue", "red"):
        engine.step(state, Controls(prompt))
        seen.append(state.text)
    kept = [later is earlier for earlier, later in pairwise(seen)]
    assert kept == [True, False, True, False]


BAD: list[tuple[str, dict[str, Any]]] = [
    ("prompt_invalid", {"prompt": 5}),
    ("prompt_invalid", {"prompt": None}),
    ("prompt_invalid", {"prompt": b"red"}),
    ("prompt_too_long", {"prompt": "x" * 41}),
    ("seed_invalid", {"seed": -1}),
    ("seed_invalid", {"seed": 2**31}),
    ("seed_invalid", {"seed": 1.5}),
    ("seed_invalid", {"seed": "7"}),
    ("strength_invalid", {"strength": -0.01}),
    ("strength_invalid", {"strength": 1.01}),
    ("strength_invalid", {"strength": float("nan")}),
    ("strength_invalid", {"strength": "0.5"}),
    ("structure_invalid", {"structure": -0.01}),
    ("structure_invalid", {"structure": float("nan")}),
    ("structure_invalid", {"structure": "0.5"}),
    ("transition_invalid", {"transition": "fade"}),
    ("transition_invalid", {"transition": None}),
    ("transition_invalid", {"glide_chunks": 0}),
    ("transition_invalid", {"glide_chunks": 65}),
    ("transition_invalid", {"glide_chunks": 2.5}),
    ("steps_invalid", {"steps": 3}),
    ("steps_invalid", {"steps": 33}),
    ("steps_invalid", {"steps": -1}),
    ("steps_invalid", {"steps": "4"}),
    ("lora_unknown", {"lora": "style"}),
    ("lora_invalid", {"lora_strength": 4.5}),
    ("lora_invalid", {"lora_strength": float("nan")}),
    ("lora_invalid", {"lora_strength": 10**400}),
]


@pytest.mark.parametrize(("code", "change"), BAD, ids=str)
def test_controls_out_of_range_are_refused_and_the_stream_goes_on_as_if_never_asked(
    engine: Engine, code: str, change: dict[str, Any]
) -> None:
    state = engine.open(7)
    before = run(engine, state, RED)
    with pytest.raises(PipelineError) as refused:
        engine.step(state, replace(RED, **change))
    assert refused.value.code == code
    assert refused.value.message
    assert refused.value.remedy
    assert same([*before, *run(engine, state, RED)], run(engine, engine.open(7), RED, RED))


@pytest.mark.parametrize(
    "source",
    [
        np.zeros((7, 64, 96, 3), np.uint8),
        np.zeros((8, 96, 64, 3), np.uint8),
        np.zeros((8, 64, 96, 4), np.uint8),
        np.zeros((64, 96, 3), np.uint8),
        np.zeros((8, 64, 96, 3), np.float32),
    ],
    ids=lambda source: f"{source.dtype}{source.shape}",
)
def test_pictures_of_another_shape_or_kind_are_refused(engine: Engine, source: np.ndarray) -> None:
    state = engine.open(7)
    before = run(engine, state, RED)
    with pytest.raises(PipelineError) as refused:
        engine.step(state, RED, source)
    assert refused.value.code == "source_invalid"
    assert str(source.shape) in refused.value.message
    assert same([*before, *run(engine, state, RED)], run(engine, engine.open(7), RED, RED))


def test_the_edges_of_every_range_are_allowed(engine: Engine, config: ModelConfig) -> None:
    for controls in (
        Controls(prompt=""),
        Controls(prompt="é" * 40),
        Controls(prompt="red", seed=0),
        Controls(prompt="red", seed=2**31 - 1),
        Controls(prompt="red", steps=4, glide_chunks=64, lora_strength=4),
    ):
        assert np.isfinite(engine.step(engine.open(controls.seed), controls).latents_TCHW).all()


def test_the_trace_is_entered_for_every_stage_in_order_and_never_nested(
    config: ModelConfig, codec: PocketCodec, text: TextEncoder, student: Student
) -> None:
    said: list[str] = []

    @contextmanager
    def trace(stage: str) -> Iterator[None]:
        said.append(stage)
        yield
        said.append(f"end {stage}")

    traced = Engine(config, codec, text, student, trace=trace)
    state = traced.open(7)

    def stages(strength: float, source: np.ndarray | None) -> list[str]:
        said.clear()
        traced.step(state, replace(RED, strength=strength), source)
        assert said[1::2] == [f"end {stage}" for stage in said[::2]]
        return said[::2]

    passes = ["denoise_0", "denoise_1", "denoise_2", "denoise_3"]
    assert stages(0.6, None) == ["text", "encode", *passes, "cache", "decode", "convert"]
    # Shift 3 puts the lower levels at 0.9, 0.75 and 0.5.
    assert stages(0.8, camera(config)) == ["text", "encode", *passes[:3], "cache", "decode", "convert"]
    assert stages(0.0, camera(config)) == ["text", "encode", "cache", "decode", "convert"]


def test_forty_chunks_live_in_the_memory_of_the_first(engine: Engine, config: ModelConfig) -> None:
    state = engine.open(7)
    places = state.cache.keys.data_ptr(), state.cache.values.data_ptr()
    one_latent_frame_bytes = 4 * config.codec.latent_channels * config.latent_size[0] * config.latent_size[1]
    for index in range(40):
        chunk = engine.step(state, RED, camera(config) if index % 3 else None)
        assert np.isfinite(chunk.latents_TCHW).all()
        assert (state.cache.keys.data_ptr(), state.cache.values.data_ptr()) == places
        assert state.encoder.pending_TCHW == []
        assert state.decoder.previous_CHW is not None
        assert state.decoder.previous_CHW.untyped_storage().nbytes() == one_latent_frame_bytes
    assert state.cache.frames == config.cache.sink + config.cache.window
    assert state.index == 40


def test_warming_up_leaves_no_trace_in_later_streams(engine: Engine) -> None:
    before = run(engine, engine.open(7), RED, RED)
    engine.warm_up()
    assert same(before, run(engine, engine.open(7), RED, RED))


def test_an_open_gate_keeps_a_streams_first_frame_until_the_stream_begins_again(open_gate: Engine) -> None:
    state = open_gate.open(7)
    first, *later = run(open_gate, state, *[RED] * 5)
    assert np.array_equal(first.latents_TCHW[0], first.latents_TCHW[1])
    for chunk in later:
        assert np.array_equal(chunk.latents_TCHW, first.latents_TCHW)
    open_gate.reset(state, 8)
    other = open_gate.step(state, replace(RED, seed=8))
    assert not np.array_equal(other.latents_TCHW[1], first.latents_TCHW[1])


@pytest.mark.parametrize("transition", ["cut", "recache"])
def test_a_gate_keeps_nothing_of_what_the_words_before_told(open_gate: Engine, transition: str) -> None:
    """In the first chunk under new words alone; what that one drew stays."""
    state, blue = open_gate.open(7), replace(RED, prompt="blue ball", transition=transition)
    before = run(open_gate, state, RED, RED)[-1]
    first, *later = run(open_gate, state, blue, blue, blue)
    assert not np.isclose(first.latents_TCHW, before.latents_TCHW).any()
    assert all(np.array_equal(chunk.latents_TCHW, first.latents_TCHW) for chunk in later)


def test_a_gate_lets_nothing_through_while_words_glide(open_gate: Engine) -> None:
    state, blue = open_gate.open(7), replace(RED, prompt="blue ball", transition="glide", glide_chunks=3)
    made = run(open_gate, state, RED, blue, blue, blue, blue)
    moved = [not np.array_equal(one.latents_TCHW, other.latents_TCHW) for one, other in pairwise(made)]
    assert moved == [True, True, True, False]


def test_what_is_painted_to_show_another_prompt_is_not_kept_by_a_gate(open_gate: Engine) -> None:
    state, painted = open_gate.open(7), replace(RED, regions=0.5, paint="100" + "000")
    before = run(open_gate, state, *[painted] * 5)[-1]
    after = open_gate.step(state, replace(painted, prompt="blue ball"))
    assert after.active_HW is not None and after.active_HW.sum() == 1
    assert not np.array_equal(after.latents_TCHW[..., :2, :2], before.latents_TCHW[..., :2, :2])
    assert np.array_equal(after.latents_TCHW[0, :, 2:], before.latents_TCHW[1, :, 2:])


def test_what_was_held_while_a_painted_part_got_new_words_is_not_kept_once_these_reach_it(open_gate: Engine) -> None:
    """Whether the mask grows or is lifted."""
    state, paint = open_gate.open(7), replace(RED, regions=0.5, paint="100" + "000")
    red = run(open_gate, state, *[paint] * 5)[-1]
    blue = run(open_gate, state, *[replace(paint, prompt="blue ball")] * 2)[-1]
    grown = open_gate.step(state, replace(paint, prompt="blue ball", paint="110" + "000"))
    assert np.array_equal(grown.latents_TCHW[..., :2, :2], blue.latents_TCHW[..., :2, :2])
    assert not np.array_equal(grown.latents_TCHW[..., :2, 2:4], red.latents_TCHW[..., :2, 2:4])
    assert np.array_equal(grown.latents_TCHW[..., 2:, :], red.latents_TCHW[..., 2:, :])
    lifted = open_gate.step(state, Controls("blue ball", RED.seed))
    assert np.array_equal(lifted.latents_TCHW[..., :2, :4], grown.latents_TCHW[..., :2, :4])
    assert not np.isclose(lifted.latents_TCHW[..., 2:, :], red.latents_TCHW[..., 2:, :]).any()


def test_the_same_words_spelt_otherwise_change_nothing(open_gate: Engine) -> None:
    state = open_gate.open(7)
    before = run(open_gate, state, RED, RED)[-1]
    after = open_gate.step(state, replace(RED, prompt=f" {RED.prompt.upper()}  "))
    assert after.prompt == f" {RED.prompt.upper()}  "
    assert np.array_equal(after.latents_TCHW, before.latents_TCHW)


def test_anchored_passes_change_what_follows_the_opening_where_there_is_no_source(
    gated_engine: Engine, anchored_engine: Engine
) -> None:
    ours, theirs = (
        [chunk.latents_TCHW for chunk in run(each, each.open(7), RED, RED)] for each in (anchored_engine, gated_engine)
    )
    assert np.array_equal(ours[0], theirs[0])
    assert not np.allclose(ours[1], theirs[1], atol=1e-4)


def test_a_camera_is_followed_with_the_whole_past(gated_engine: Engine, anchored_engine: Engine) -> None:
    source = camera(gated_engine.config)
    ours, theirs = (
        [each.step(state, replace(RED, strength=0.9), source).latents_TCHW for _ in range(3)]
        for each in (anchored_engine, gated_engine)
        for state in [each.open(7)]
    )
    assert all(np.array_equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_an_open_gate_of_the_pass_before_stays_open_in_anchored_passes(open_gate: Engine) -> None:
    config = replace(open_gate.config, sampler=replace(open_gate.config.sampler, anchored=0.75))
    engine = Engine(config, open_gate.codec, open_gate.text, open_gate.student)
    first, *later = run(engine, engine.open(7), *[RED] * 4)
    assert all(np.array_equal(chunk.latents_TCHW, first.latents_TCHW) for chunk in later)


@pytest.mark.parametrize("on_wan", [False, True])
def test_low_rank_weights_that_cannot_be_worn_are_told_before_the_model_is_loaded(
    on_wan: bool, config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object) -> None:
        raise AssertionError("nothing is loaded")

    monkeypatch.setattr("pipeline.engine.load_parts", load)
    monkeypatch.setattr("pipeline.engine.load_wan", load)
    nowhere = tmp_path / "nowhere"
    model = WanModel(config, nowhere, nowhere, nowhere, nowhere) if on_wan else None
    wrong, text = tmp_path / "wrong.safetensors", tmp_path / "text.safetensors"
    save_file(peft_lora(["blocks.0.attn1.to_q"], {"blocks.0.attn1.to_q.weight": torch.Size((7, 5))}), wrong)
    text.write_text("no weights")
    for paths, code in (
        ([nowhere], "checkpoint_missing"),
        ([text], "checkpoint_damaged"),
        ([wrong], "lora_mismatch"),
    ):
        with pytest.raises(PipelineError) as error:
            Engine.load(model, loras=paths)
        assert error.value.code == code and str(paths[0]) in error.value.message
