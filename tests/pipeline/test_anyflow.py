"""AnyFlow-FAR against diffusers' own transformer, pipeline and scheduler, with tiny random weights.

Theirs pads a chunk to 128 tokens with keys of zeros that a denoise pass looks at too; their makers' own code and their
training do not. So sizes are chosen that need no padding, and one test shows that it is all that differs.
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AnyFlowFARPipeline, AnyFlowFARTransformer3DModel, FlowMapEulerDiscreteScheduler
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from pipeline.attention import CachedAttention, attention, rotate
from pipeline.bases import BASES
from pipeline.chunk import Chunk, Controls
from pipeline.config import CacheConfig, CodecConfig, ModelConfig, SamplerConfig, StudentConfig
from pipeline.convert import convert, verify
from pipeline.engine import Engine
from pipeline.errors import PipelineError
from pipeline.fit import blank
from pipeline.kv_cache import KVCache
from pipeline.models import FAMILIES, Family
from pipeline.prompts import Prompts
from pipeline.sampler import draw_noise, ends, levels, travel
from pipeline.student import Student
from pipeline.tiny_codec import TinyDecoder, TinyEncoder
from pipeline.wan import WanPair
from pipeline.weights import digest, load_transformer
from pipeline.wording import PastLatents, coarsen, recache
from tests.pipeline.conftest import stir
from tests.pipeline.published import publish_folder

# Theirs is slow without a compiler, and says so.
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

ROWS = [row for row in FAMILIES if row.coarse]
RED = Controls("red ball")
SHAPE = StudentConfig(
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=4,
    out_channels=4,
    text_dim=16,
    freq_dim=32,
    ffn_dim=48,
    num_layers=2,
    compressed_patch_size=(1, 4, 4),
    full_chunk_limit=3,
    gate_value=0.25,
    deltatime_type="r",
)
TINY = ModelConfig(
    name="tiny-far",
    width=256,
    height=128,
    chunk=3,
    first_chunk=1,
    student=SHAPE,
    codec=CodecConfig(latent_channels=4, spatial_stride=8, first_alone=True),
    sampler=SamplerConfig(shift=5.0, any_steps=True, prediction="mean_flow"),
    cache=CacheConfig(sink=0, coarse=12, window=6, positions="stream", rewrites=True),
)


@pytest.fixture(scope="module")
def student() -> Student:
    torch.manual_seed(0)
    made = Student(SHAPE).eval().requires_grad_(False)
    stir(made, 0.2)
    return made


def reference(student: Student) -> Any:
    """The same weights in diffusers' own class."""
    ours = ("qk_norm", "position_channels", "control_channels")
    known = {name: value for name, value in asdict(student.config).items() if name not in ours}
    theirs = AnyFlowFARTransformer3DModel(**known).eval().requires_grad_(False)
    theirs.load_state_dict(student.model.state_dict())
    return theirs


def read(prompt: str) -> Tensor:
    generator = torch.Generator().manual_seed(len(prompt))
    return torch.randn(4, 16, generator=generator)


@pytest.fixture(scope="module")
def pair() -> WanPair:
    torch.manual_seed(4)
    return WanPair(TinyEncoder(4, 8), TinyDecoder(4, (4, 4, 4, 4))).eval().requires_grad_(False)


def run(engine: Engine, count: int, controls: Controls = RED) -> list[Chunk]:
    state = engine.open(controls.seed)
    return [engine.step(state, controls) for _ in range(count)]


def theirs_of(student: Student, config: ModelConfig, chunks: int, steps: int) -> Tensor:
    """Latents (T, C, h, w) of their pipeline, from the noise that our chunks are drawn from."""
    partition = [config.latent_frames(index) for index in range(chunks)]
    scheduler = FlowMapEulerDiscreteScheduler(shift=config.sampler.shift)
    pipe = AnyFlowFARPipeline(None, None, reference(student), None, scheduler)
    pipe.set_progress_bar_config(disable=True)
    size = (config.codec.latent_channels, *config.latent_size)
    noise = torch.cat([draw_noise((1, count, *size), RED.seed, index, 0) for index, count in enumerate(partition)], 1)
    made = pipe(
        prompt_embeds=read(RED.prompt)[None],
        latents=noise.transpose(1, 2),
        height=config.height,
        width=config.width,
        num_frames=4 * sum(partition) - 3,
        num_inference_steps=steps,
        chunk_partition=partition,
        output_type="latent",
    )
    return made.frames[0].transpose(0, 1)


def differs(ours: list[Chunk], theirs: Tensor) -> float:
    return float((torch.from_numpy(np.concatenate([chunk.latents_TCHW for chunk in ours])) - theirs).abs().max())


@pytest.mark.parametrize(("steps", "chunks"), [(4, 7), (1, 2), (2, 2), (3, 2), (8, 2)])
def test_a_stream_draws_what_their_pipeline_draws_of_as_many_chunks_in_any_number_of_steps(
    student: Student, pair: WanPair, steps: int, chunks: int
) -> None:
    """Seven chunks: the clip that they were trained on, but for its last chunk of two frames."""
    ours = run(Engine(TINY, pair, Prompts(read, 4), student), chunks, replace(RED, steps=steps))
    assert differs(ours, theirs_of(student, TINY, chunks, steps)) < 1e-5


def test_keys_of_zeros_are_all_that_differs_where_theirs_pads_a_chunk(
    student: Student, pair: WanPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = replace(TINY, width=96, height=64)
    engine, theirs = Engine(small, pair, Prompts(read, 4), student), theirs_of(student, small, 4, 2)
    assert differs(run(engine, 4, replace(RED, steps=2)), theirs) > 1e-3

    def padded(attend: CachedAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        more = (0, 0, 0, 0, 0, 0 if attend.writing else -q.shape[1] % 128)
        return attention(q, F.pad(k, more), F.pad(v, more))

    monkeypatch.setattr(CachedAttention, "look", padded)
    assert differs(run(engine, 4, replace(RED, steps=2)), theirs) < 1e-5


@pytest.mark.parametrize("told", ["r", "t-r"])
def test_one_chunk_equals_their_forward_whatever_a_pass_is_told_of_its_end(student: Student, told: Any) -> None:
    other = Student(replace(SHAPE, deltatime_type=told, gate_value=0.6)).eval().requires_grad_(False)
    other.load_state_dict(student.state_dict())
    generator = torch.Generator().manual_seed(1)
    latents, text = torch.randn(1, 3, 4, *TINY.latent_size, generator=generator), read("red")[None]
    attend = CachedAttention(KVCache.of(TINY), other, TINY.grid, 3)
    ours = other.predict(latents, 0.9, other.text_kv(text), attend, level=other.at(0.9, 0.4))
    times, goals = torch.full((1, 3), 900.0), torch.full((1, 3), 400.0)
    theirs = reference(other)(latents, times, goals, text, [3], return_dict=False)[0]
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8, 32])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_levels_and_the_way_from_one_to_the_next_are_their_schedulers(row: Family, count: int) -> None:
    scheduler = FlowMapEulerDiscreteScheduler(shift=5.0)
    scheduler.set_timesteps(count)
    sigmas = levels(row.sampler, count=count)
    assert [*sigmas, 0] == pytest.approx(scheduler.sigmas.tolist(), abs=1e-9)
    assert ends(sigmas) == pytest.approx(scheduler.sigmas[1:].tolist(), abs=1e-9)
    assert [1000 * sigma for sigma in sigmas] == pytest.approx(scheduler.timesteps.tolist())
    noisy, *flows = torch.randn(count + 1, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(count))
    made = travel(lambda x, sigma, step: flows[step] + x, noisy, sigmas)
    for time, flow in zip(scheduler.timesteps, flows, strict=True):
        noisy = scheduler.step(flow + noisy, time, noisy).prev_sample
    torch.testing.assert_close(made, noisy)


def test_a_pass_whose_way_has_no_length_is_left_out() -> None:
    seen: list[float] = []

    def student(noisy: Tensor, sigma: float, step: int) -> Tensor:
        seen.append(sigma)
        return torch.ones(1)

    assert travel(student, torch.ones(1), [0.6, 0.6, 0.5]).item() == pytest.approx(0.4)
    assert seen == [0.6, 0.5]


class Everything:
    """All keys and values there ever were, coarse and not; each look picks the frames that the rule names."""

    def __init__(self, student: Student, config: ModelConfig) -> None:
        self.student, self.config = student, config
        self.frames: list[dict[int, tuple[Tensor, Tensor]]] = []
        self.far: list[dict[int, tuple[Tensor, Tensor]]] = []
        self.coarse, self.writing = False, False
        self.own: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.own[layer] = (k, v)
        whole, grid, limit = self.config.grid, self.config.grid, self.config.student.rope_max_seq_len
        large = self.student.coarse_grid(whole)
        grid = large if self.coarse else whole
        count, now = k.shape[1] // (grid[0] * grid[1]), len(self.far if self.coarse else self.frames)
        coarse = [(number, True, self.far[number][layer]) for number in range(len(self.far))][-12:]
        near = [] if self.coarse else range(len(self.far), now)
        past = coarse + [(number, False, self.frames[number][layer]) for number in near]
        over = max(0, now + count - limit)
        keys, values = [], []
        for number, larger, (key, value) in past:
            keys.append(rotate(key, self.student.rope_rows([number - over], large if larger else whole, coarse=larger)))
            values.append(value)
        places = [number - over for number in range(now, now + count)]
        rows = self.student.rope_rows(places, grid, coarse=self.coarse)
        return attention(rotate(q, rows), torch.cat([*keys, rotate(k, rows)], 1), torch.cat([*values, v], 1))

    def keep(self, count: int) -> None:
        split = {layer: [x.tensor_split(count, 1) for x in pair] for layer, pair in self.own.items()}
        kept = self.far if self.coarse else self.frames
        kept += [{layer: (k[frame], v[frame]) for layer, (k, v) in split.items()} for frame in range(count)]


@torch.inference_mode()
def test_a_stream_without_an_end_equals_a_list_that_forgets_nothing(student: Student) -> None:
    shape = replace(SHAPE, rope_max_seq_len=32)  # it ends after ten chunks
    config = replace(TINY, width=64, height=64, student=shape)
    other = Student(shape).eval().requires_grad_(False)
    other.load_state_dict(student.state_dict())
    generator, text = torch.Generator().manual_seed(2), other.text_kv(read("red")[None])
    cache, naive = KVCache.of(config), Everything(other, config)
    past, clip, starts = PastLatents(cache, (4, *config.latent_size), "cpu"), list[Tensor](), [0]
    attends = set()
    for index in range(14):
        count = config.latent_frames(index)
        latents = torch.randn(1, count, 4, *config.latent_size, generator=generator)
        attend = CachedAttention(cache, other, config.grid, count)
        ours = other.predict(latents, 0.7, text, attend, level=other.at(0.7, 0.3))
        naive.coarse = False
        theirs = other.predict(latents, 0.7, text, naive, level=other.at(0.7, 0.3))
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5, msg=f"chunk {index}")
        assert cache.coarse is not None
        attends.add(cache.coarse.frames + cache.frames + count)

        cache.commit(count)
        past.keep(latents[0])
        coarsen(past, other, text, config)
        recache(past, other, text, config, window_only=True)
        # The slow way: the chunk that leaves through larger patches, the two newest again as they are.
        clip.append(latents)
        starts.append(starts[-1] + count)
        if index >= 2:
            naive.coarse = True
            other.write(clip[index - 2], text, naive, coarse=True)  # type: ignore[arg-type]
            naive.keep(clip[index - 2].shape[1])
            naive.coarse = False
        del naive.frames[starts[max(0, index - 1)] :]
        for chunk in clip[max(0, index - 1) :]:
            other.write(chunk, text, naive)  # type: ignore[arg-type]
            naive.keep(chunk.shape[1])
    assert max(attends) == 21 == 12 + 6 + 3


@torch.inference_mode()
def test_a_past_that_is_rewritten_equals_one_that_was_always_under_the_new_words(student: Student) -> None:
    config = replace(TINY, width=64, height=64)
    red, blue = (student.text_kv(read(words)[None]) for words in ("red", "a blue one"))
    generator = torch.Generator().manual_seed(3)
    clip = torch.randn(1, 13, 4, *config.latent_size, generator=generator).split([1, 3, 3, 3, 3], 1)

    def remembered(words: Any) -> PastLatents:
        past = PastLatents(KVCache.of(config), (4, *config.latent_size), "cpu")
        for chunk in clip:
            past.cache.commit(chunk.shape[1])
            past.keep(chunk[0])
            coarsen(past, student, words, config)
            recache(past, student, words, config, window_only=True)
        return past

    old, new = remembered(red), remembered(blue)
    assert old.cache.coarse is not None and new.cache.coarse is not None
    assert (old.cache.coarse.keys - new.cache.coarse.keys).abs().max() > 1e-3
    recache(old, student, blue, config)
    for ours, theirs in ((old.cache, new.cache), (old.cache.coarse, new.cache.coarse)):
        assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)


def test_the_first_chunk_is_one_picture_and_a_start_picture_is_all_of_it(student: Student, pair: WanPair) -> None:
    config = replace(TINY, width=64, height=64)
    engine, state = Engine(config, pair, Prompts(read, 4), student), None
    state = engine.open(7)
    picture = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)
    begun = engine.step(state, replace(RED, strength=0.0), picture)
    long = engine.step(engine.open(7), replace(RED, strength=0.0), np.repeat(picture, 12, 0))
    assert np.array_equal(begun.latents_TCHW, long.latents_TCHW)
    follow = [engine.step(state, each) for each in (RED, replace(RED, steps=1), replace(RED, regions=0.5))]
    over = engine.step(state, replace(RED, strength=0.6), np.repeat(picture, 12, 0))
    shown = [len(chunk.frames_THWC) for chunk in (begun, *follow, over)]
    assert shown == [config.pictures(index) for index in range(5)] == [1, 12, 12, 12, 12]
    assert state.regions is None and follow[-1].active_HW is None
    assert all(np.isfinite(chunk.latents_TCHW).all() for chunk in (begun, *follow, over))
    engine.reset(state, 7)
    again = engine.step(state, RED), engine.step(state, RED)
    for made, fresh in zip(again, run(engine, 2), strict=True):
        assert np.array_equal(made.frames_THWC, fresh.frames_THWC)


def test_a_tall_picture_has_a_coarse_past_too(pair: WanPair) -> None:
    width, height = 320, 576
    small = replace(SHAPE, num_attention_heads=1, num_layers=1)
    torch.manual_seed(0)
    student = Student(small).eval().requires_grad_(False)
    stir(student, 0.2)
    config = replace(TINY, width=width, height=height, student=small)
    engine = Engine(config, pair, Prompts(read, 4), student)
    state = engine.open(7)
    for count in (1, 12, 12, 12):
        chunk = engine.step(state, replace(RED, steps=1))
        assert chunk.frames_THWC.shape == (count, height, width, 3)
        assert np.isfinite(chunk.latents_TCHW).all()
    coarse = state.cache.coarse
    assert coarse is not None and coarse.written == 4
    assert coarse.keys.shape[3] == width * height // 32**2


def test_half_precision_and_layers_in_bytes_go_through_all_of_it(
    student: Student, pair: WanPair, tmp_path: Path
) -> None:
    config, folder = replace(TINY, width=64, height=64), publish_folder(student, tmp_path)
    for dtype, bits in ((torch.bfloat16, 16), (torch.float32, 8)):
        narrow = load_transformer(folder, SHAPE, dtype, bits=bits).eval().requires_grad_(False)
        engine = Engine(config, pair, Prompts(read, 4), narrow)
        made, exact = run(engine, 3)[-1], run(Engine(config, pair, Prompts(read, 4), student), 3)[-1]
        assert engine.student.dtype == dtype
        assert 0 < np.abs(made.latents_TCHW - exact.latents_TCHW).mean() < 0.2 * np.abs(exact.latents_TCHW).mean()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_published_folder_becomes_one_that_loads_strictly_in_both_librarys_words(
    row: Family, student: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BASES, row.base, replace(BASES[row.base], shape=SHAPE, channels=4))
    source, made = publish_folder(student, tmp_path / "transformer"), tmp_path / "made"
    assert convert(source, made, row.shape)
    assert not convert(source, made, row.shape, sha256=digest(source))
    verify(made)
    weights = student.model.state_dict()
    loaded = load_transformer(made, row.shape).model.state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in loaded.items())
    theirs = AnyFlowFARTransformer3DModel.from_config(AnyFlowFARTransformer3DModel.load_config(made))
    theirs.load_state_dict(load_file(made / "diffusion_pytorch_model.safetensors"))
    assert theirs.config.gate_value == 0.25
    assert row.config(256, 128).cache == TINY.cache and row.config(256, 128).first_chunk == 1
    assert row.config(256, 128).sampler == TINY.sampler
    assert row.config(256, 128).tiles is None


def refusal(make: Callable[[], object], code: str) -> str:
    with pytest.raises(PipelineError) as refused:
        make()
    assert refused.value.code == code and "\n" not in refused.value.message
    return refused.value.message


def test_the_makers_two_modules_are_all_that_a_wan_of_this_size_has_not() -> None:
    """By hand, from the makers' `setup_far_model` and `setup_flowmap_model`, for 1536 channels."""
    far, wan = (blank(BASES[base].shape).model.state_dict() for base in ("anyflow-1.3b", "wan-1.3b"))
    assert {name: value.shape for name, value in far.items() if name in wan} == {
        name: value.shape for name, value in wan.items()
    }
    assert {name: tuple(value.shape) for name, value in far.items() if name not in wan} == {
        "far_patch_embedding.weight": (1536, 16, 1, 4, 4),
        "far_patch_embedding.bias": (1536,),
        "condition_embedder.delta_embedder.linear_1.weight": (1536, 256),
        "condition_embedder.delta_embedder.linear_1.bias": (1536,),
        "condition_embedder.delta_embedder.linear_2.weight": (1536, 1536),
        "condition_embedder.delta_embedder.linear_2.bias": (1536,),
    }


def test_a_transformer_of_the_other_kind_is_named(student: Student, tmp_path: Path) -> None:
    plain = replace(SHAPE, compressed_patch_size=None, full_chunk_limit=None, gate_value=None, deltatime_type=None)
    source = publish_folder(student, tmp_path / "far")
    told = refusal(lambda: convert(source, tmp_path / "made", plain), "weights_mismatch")
    assert "compressed_patch_size is (1, 4, 4), the model's is None" in told
    wide = replace(SHAPE, gate_value=0.5)
    assert "gate_value is 0.25" in refusal(lambda: load_transformer(source, wide), "weights_mismatch")
    (source / "config.json").write_text('{"_class_name": "AnyFlowTransformer3DModel"}')
    assert "AnyFlowTransformer3DModel" in refusal(lambda: load_transformer(source, SHAPE), "weights_mismatch")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"cache": CacheConfig(sink=0, window=6)}, "followed by a window"),
        ({"cache": replace(TINY.cache, window=3)}, "not 2 chunks of 3"),
        ({"sampler": SamplerConfig()}, "mean flow"),
        ({"sampler": replace(TINY.sampler, anchored=0.5)}, "anchored passes see a sink"),
        ({"first_chunk": 4}, "first chunk of 4"),
        ({"width": 240}, "tokens of 32x32"),
        ({"student": replace(SHAPE, compressed_patch_size=None)}, "larger patches"),
    ],
)
def test_a_rule_that_cannot_be_run_says_why(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(TINY, **change)
