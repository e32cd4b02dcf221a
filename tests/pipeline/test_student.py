"""Our explicit forward against diffusers' own, and the cache against a whole clip at once."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pipeline.attention import CachedAttention, attention, rotate, turns
from pipeline.config import CacheConfig, ModelConfig
from pipeline.kv_cache import KVCache
from pipeline.structure import CHANNELS
from pipeline.student import Student, modulated, positions, rms_normed, scaled
from pipeline.training.forcing import teacher_forced
from pipeline.training.settings import pocket_config
from tests.pipeline.conftest import stir


@pytest.fixture(scope="module")
def config(config: ModelConfig) -> ModelConfig:
    """Without structure: what the stock model takes is the latents alone."""
    return replace(config, student=replace(config.student, in_channels=4, control_channels=0))


@pytest.fixture(scope="module")
def student(config: ModelConfig) -> Student:
    torch.manual_seed(0)
    made = Student(config.student).eval().requires_grad_(False)
    stir(made, 0.2)
    return made


def draw(config: ModelConfig, frames: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(1, frames, config.student.in_channels, *config.latent_size, generator=generator)
    return latents, torch.randn(1, config.text.length, config.student.text_dim, generator=generator)


def empty_cache(config: ModelConfig, cache: CacheConfig | None = None) -> KVCache:
    shape = config.student
    heads = (shape.num_attention_heads, shape.attention_head_dim)
    return KVCache(cache or config.cache, shape.num_layers, config.tokens_per_frame, *heads)


def push(student: Student, config: ModelConfig, cache: KVCache, chunk: Tensor, text: Tensor, sigma: float) -> Tensor:
    """A denoise pass at sigma and then the cache pass on the same latents; returns the denoise pass's flow."""
    attend = CachedAttention(cache, student, config.grid, chunk.shape[1])
    kv = student.text_kv(text)
    flow = student(chunk, torch.tensor([[1000 * sigma]]), kv, attend)
    attend.writing = True
    student(chunk, torch.zeros(1, 1), kv, attend)
    cache.commit(chunk.shape[1])
    return flow


def test_one_chunk_without_a_past_equals_the_stock_diffusers_model(student: Student, config: ModelConfig) -> None:
    latents, text = draw(config, 2)
    stock = student.model(latents.transpose(1, 2), torch.tensor([937.5]), text, return_dict=False)[0].transpose(1, 2)
    attend = CachedAttention(empty_cache(config), student, config.grid, 2)
    ours = student(latents, torch.tensor([[937.5]]), student.text_kv(text), attend)
    torch.testing.assert_close(ours, stock, atol=1e-5, rtol=1e-5)


def test_chunk_by_chunk_equals_the_stock_model_under_a_block_causal_mask(student: Student, config: ModelConfig) -> None:
    latents, text = draw(config, 6)
    owner = torch.arange(6).div(2, rounding_mode="floor").repeat_interleave(config.tokens_per_frame)
    mask = owner[:, None] >= owner[None]
    rows = student.rope_rows(list(range(6)), config.grid)

    class BlockCausal:
        """Stock attention with a mask: the modules and the order of operations are diffusers' own."""

        def __call__(self, attn, hidden, encoder=None, attention_mask=None, rotary_emb=None):  # type: ignore[no-untyped-def]
            heads = (attn.heads, -1)
            q = attn.norm_q(attn.to_q(hidden)).unflatten(2, heads)
            k = attn.norm_k(attn.to_k(hidden)).unflatten(2, heads)
            out = attention(rotate(q, rows), rotate(k, rows), attn.to_v(hidden).unflatten(2, heads), mask)
            return attn.to_out[0](out.flatten(2))

    stock_processors = [block.attn1.processor for block in student.model.blocks]
    for block in student.model.blocks:
        block.attn1.set_processor(BlockCausal())
    # The past is written at t = 0, so the stock model sees every token at t = 0 too.
    stock = student.model(latents.transpose(1, 2), torch.tensor([0.0]), text, return_dict=False)[0].transpose(1, 2)
    for block, processor in zip(student.model.blocks, stock_processors, strict=True):
        block.attn1.set_processor(processor)

    cache = empty_cache(config)
    ours = [push(student, config, cache, latents[:, at : at + 2], text, 0.0) for at in (0, 2, 4)]
    torch.testing.assert_close(torch.cat(ours, 1), stock, atol=1e-5, rtol=1e-5)


def rolled_out(
    student: Student,
    config: ModelConfig,
    clean: Tensor,
    noisy: Tensor,
    sigmas: Tensor,
    texts: Tensor,
    anchored: bool = False,
) -> Tensor:
    """The inference path: each noisy chunk against the cache of the clean ones before it."""
    cache, flows = empty_cache(config), []
    for index in range(sigmas.shape[1]):
        part = slice(config.chunk * index, config.chunk * (index + 1))
        attend = CachedAttention(cache, student, config.grid, config.chunk)
        kv = student.text_kv(texts[index : index + 1])
        attend.anchored = anchored
        flows.append(student(noisy[:, part], 1000 * sigmas[:, index : index + 1], kv, attend))
        attend.writing, attend.anchored = True, False
        student(clean[:, part], torch.zeros(1, 1), kv, attend)
        cache.commit(config.chunk)
    return torch.cat(flows, 1)


@pytest.mark.parametrize("past_weight", [1.0, 0.3])
@pytest.mark.parametrize(
    ("chunk", "sink", "window", "chunks"), [(2, 2, 4, 3), (2, 2, 4, 4), (1, 2, 4, 4), (1, 1, 2, 4), (3, 0, 6, 3)]
)
def test_a_forced_clip_with_a_level_and_a_prompt_per_chunk_equals_the_cache(
    student: Student, config: ModelConfig, chunk: int, sink: int, window: int, chunks: int, past_weight: float
) -> None:
    """The trainer's doubled sequence (clean past, noisy chunks) is the inference path."""
    config = replace(config, chunk=chunk, cache=CacheConfig(sink=sink, window=window, past_weight=past_weight))
    clean, _ = draw(config, chunk * chunks)
    noisy, _ = draw(config, chunk * chunks, seed=1)
    texts = torch.cat([draw(config, 2, seed=seed)[1] for seed in range(2, 2 + chunks)])
    sigmas = torch.tensor([[0.9, 0.5, 0.3, 1.0]])[:, :chunks]
    flow = teacher_forced(student, clean, noisy, sigmas, student.text_kv(texts), config)
    torch.testing.assert_close(flow, rolled_out(student, config, clean, noisy, sigmas, texts), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("past_weight", [1.0, 0.3])
def test_an_anchored_forced_clip_equals_the_cache_whose_passes_see_the_sink_alone(
    student: Student, config: ModelConfig, past_weight: float
) -> None:
    config = replace(config, cache=CacheConfig(sink=2, window=4, past_weight=past_weight))
    clean, noisy = draw(config, 8)[0], draw(config, 8, seed=1)[0]
    texts = torch.cat([draw(config, 2, seed=seed)[1] for seed in range(2, 6)])
    sigmas = torch.tensor([[0.9, 0.5, 0.3, 1.0]])
    flow = teacher_forced(student, clean, noisy, sigmas, student.text_kv(texts), config, anchored=True)
    rolled = rolled_out(student, config, clean, noisy, sigmas, texts, anchored=True)
    torch.testing.assert_close(flow, rolled, atol=1e-5, rtol=1e-5)
    whole = teacher_forced(student, clean, noisy, sigmas, student.text_kv(texts), config)
    assert torch.equal(whole[:, :4], flow[:, :4])  # nothing but the sink is before the second chunk
    assert not torch.allclose(whole[:, 4:], flow[:, 4:], atol=1e-3)


def test_an_anchored_pass_sees_what_it_would_if_the_window_were_not_there(
    student: Student, config: ModelConfig
) -> None:
    (latents, text), cache = draw(config, 8), empty_cache(config)
    for at in (0, 2, 4):
        push(student, config, cache, latents[:, at : at + 2], text, 0.5)
    attend = CachedAttention(cache, student, config.grid, 2)
    generator, heads = torch.Generator().manual_seed(5), cache.keys.shape[-2:]
    q, k, v = (torch.randn(1, 2 * config.tokens_per_frame, *heads, generator=generator) for _ in range(3))
    attend(0, q, k, v)
    attend.anchored = True
    anchored = attend(0, q, k, v)
    keys, values = (part[:, :2].flatten(1, 2) for part in cache.read(0, cache.frames))
    rows = turns(student.rope_rows([0, 1, 6, 7], config.grid))
    both = rotate(torch.cat([keys, k], 1), rows)
    slow = attention(rotate(q, rows[2 * config.tokens_per_frame :]), both, torch.cat([values, v], 1))
    torch.testing.assert_close(anchored, slow, atol=1e-6, rtol=1e-5)


def test_forced_clips_in_a_batch_equal_one_at_a_time(student: Student, config: ModelConfig) -> None:
    clean, noisy = (torch.cat([draw(config, 6, seed=seed)[0] for seed in seeds]) for seeds in ((0, 1), (2, 3)))
    texts = torch.cat([draw(config, 2, seed=seed)[1] for seed in range(4, 10)])
    sigmas = torch.tensor([[0.9, 0.5, 0.3], [0.2, 1.0, 0.7]])
    together = teacher_forced(student, clean, noisy, sigmas, student.text_kv(texts), config)
    for row in range(2):
        one, kv = slice(row, row + 1), student.text_kv(texts[3 * row : 3 * row + 3])
        alone = teacher_forced(student, clean[one], noisy[one], sigmas[one], kv, config)
        torch.testing.assert_close(together[one], alone, atol=1e-5, rtol=1e-5)


def test_a_clip_that_jumps_after_its_first_chunk_stands_where_a_long_stream_does(config: ModelConfig) -> None:
    """After the wrap there is a gap between sink and window. One layer: its keys depend on their own frame alone."""
    shallow = Student(replace(config.student, num_layers=1)).eval().requires_grad_(False)
    config = replace(config, student=shallow.config)
    stream, _ = draw(config, 16)
    noisy, text = draw(config, 2, seed=1)
    cache = empty_cache(config)
    for at in range(0, 16, 2):
        push(shallow, config, cache, stream[:, at : at + 2], text, 0.5)
    attend = CachedAttention(cache, shallow, config.grid, 2)
    live = shallow(noisy, torch.tensor([[800.0]]), shallow.text_kv(text), attend)

    clip = torch.cat([stream[:, :2], stream[:, -4:], noisy], 1)
    sigmas, kv = torch.full((1, 4), 0.8), shallow.text_kv(text.expand(4, -1, -1))
    forced = teacher_forced(shallow, clip, clip, sigmas, kv, config)
    torch.testing.assert_close(forced[:, -2:], live, atol=1e-5, rtol=1e-5)

    wrong = torch.cat([stream[:, 2:4], stream[:, -4:], noisy], 1)
    other = teacher_forced(shallow, wrong, clip, sigmas, kv, config)
    assert (other[:, -2:] - live).abs().max() > 1e-4


def test_an_xformers_that_does_not_fit_the_machine_is_never_imported(tmp_path: Path) -> None:
    package = tmp_path / "xformers"
    package.mkdir()
    (package / "__init__.py").write_text("raise OSError('built for another machine')")
    (tmp_path / "xformers-0.0.35.dist-info").mkdir()
    (tmp_path / "xformers-0.0.35.dist-info" / "METADATA").write_text("Name: xformers\nVersion: 0.0.35\n")
    root = Path(__file__).parents[2]
    code = "import sys; import pipeline.engine; print('xformers' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert ended.stdout.strip() == "False", ended.stderr


def test_no_chunk_sees_the_future(student: Student, config: ModelConfig) -> None:
    clip, text = draw(config, 6)
    changed = clip.clone()
    changed[:, 4:] += 1
    kv = student.text_kv(text.expand(3, -1, -1))
    one, other = (teacher_forced(student, each, each, torch.full((1, 3), 0.5), kv, config) for each in (clip, changed))
    assert torch.equal(one[:, :4], other[:, :4])
    assert (one[:, 4:] - other[:, 4:]).abs().max() > 1e-3


def test_a_denoise_pass_leaves_the_cache_untouched(student: Student, config: ModelConfig) -> None:
    latents, text = draw(config, 4)
    cache = empty_cache(config)
    push(student, config, cache, latents[:, :2], text, 0.5)
    before = (cache.keys.clone(), cache.values.clone(), cache.written)
    attend = CachedAttention(cache, student, config.grid, 2)
    student(latents[:, 2:], torch.tensor([[500.0]]), student.text_kv(text), attend)
    assert torch.equal(cache.keys, before[0])
    assert torch.equal(cache.values, before[1])
    assert cache.written == before[2]


def test_a_wrapped_ring_equals_a_fresh_cache_of_the_remembered_frames(student: Student, config: ModelConfig) -> None:
    """Window-relative positions: after ten chunks the past is the sink and the newest window, whatever came between."""
    latents, text = draw(config, 20)
    cache = empty_cache(config)
    for at in range(0, 20, 2):
        push(student, config, cache, latents[:, at : at + 2], text, 0.5)
    remembered = [0, 1, 16, 17, 18, 19]
    fresh = empty_cache(config, CacheConfig(sink=2, window=16))
    for place, frame in enumerate(remembered):
        slot = cache.slots()[place]
        assert slot == (frame if frame < 2 else 2 + (frame - 2) % 4)
        fresh.keys[:, :, place], fresh.values[:, :, place] = cache.keys[:, :, slot], cache.values[:, :, slot]
    fresh.commit(len(remembered))
    probe, _ = draw(config, 2, seed=9)
    kv = student.text_kv(text)
    flows = [
        student(probe, torch.tensor([[700.0]]), kv, CachedAttention(past, student, config.grid, 2))
        for past in (cache, fresh)
    ]
    torch.testing.assert_close(flows[0], flows[1], atol=1e-6, rtol=1e-6)


def test_position_and_control_channels_are_extra_input_of_the_stock_model(config: ModelConfig) -> None:
    shape = replace(config.student, in_channels=4 + 8 + CHANNELS, position_channels=8, control_channels=CHANNELS)
    torch.manual_seed(1)
    placed = Student(shape).eval().requires_grad_(False)
    latents, text = draw(config, 2)
    where = positions(8, *config.latent_size).expand(1, 2, -1, -1, -1)
    control = torch.rand(1, 2, CHANNELS, *config.latent_size)
    full = torch.cat((latents, where, control), 2).transpose(1, 2)
    stock = placed.model(full, torch.tensor([500.0]), text, return_dict=False)[0].transpose(1, 2)
    attend = CachedAttention(empty_cache(config), placed, config.grid, 2)
    ours = placed(latents, torch.tensor([[500.0]]), placed.text_kv(text), attend, control)
    torch.testing.assert_close(ours, stock, atol=1e-5, rtol=1e-5)


def test_no_two_cells_have_the_same_position() -> None:
    cells = positions(12, 12, 20).flatten(1).T
    assert torch.cdist(cells, cells).fill_diagonal_(1).min() > 0.1


def test_a_column_of_single_tokens_embeds_in_bfloat16_as_in_single_precision() -> None:
    """Chosen tiles that are one token wide: a library's convolution answered these with what lay in memory."""
    torch.manual_seed(0)
    student = Student(replace(pocket_config().student, num_layers=1)).requires_grad_(False)
    for number in range(20):
        latents = torch.randn(2, 2, 32, 120, 2, generator=torch.Generator().manual_seed(number))
        with torch.autocast("cpu", torch.bfloat16):
            made = student.embed(latents).float()
        torch.testing.assert_close(made, student.embed(latents), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pairs_are_turned_by_their_rows(dtype: torch.dtype, compiling: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin has sines and cosines written out."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    x, angles = torch.randn(2, 5, 3, 8).to(dtype), torch.randn(5, 1, 4)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles.cos(), angles.sin()
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)
    rows = torch.stack((cos, sin))
    torch.testing.assert_close(rotate(x, rows), turned.to(dtype))
    if not compiling:
        assert torch.equal(rotate(x, turns(rows)), rotate(x, rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_of_few_operations_is_torchs_own(dtype: torch.dtype) -> None:
    norm = nn.RMSNorm(8, eps=1e-2).to(dtype)
    nn.init.normal_(norm.weight)
    x = torch.randn(2, 3, 8).to(dtype)
    x[0, 0] = 0
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    made, wanted = rms_normed(norm, ours), norm(theirs)
    torch.testing.assert_close(made, wanted)
    if dtype == torch.float32:  # a half's gradient is a difference of rounded sums
        for out in (made, wanted):
            out.square().sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize(("batch", "frames"), [(1, 1), (1, 3), (2, 1), (2, 3)])
def test_each_token_is_scaled_and_shifted_as_its_latent_frame(batch: int, frames: int) -> None:
    """The twin has a scale, a shift and a gate for every token."""
    norm, x = nn.LayerNorm(8, elementwise_affine=False), torch.randn(2, 6, 8)
    told = torch.randn(3, batch, frames, 8)
    scale, shift, gate = told.repeat_interleave(6 // frames, 2).unbind()
    torch.testing.assert_close(modulated(norm, x, *told[:2]), norm(x) * scale + shift)
    torch.testing.assert_close(scaled(norm(x), told[2], x), x + norm(x) * gate)


def test_every_pass_of_a_chunk_sees_the_past_and_its_own_keys(student: Student, config: ModelConfig) -> None:
    """The twin joins them anew each time. Own ones may be fewer than a chunk's, and more again in the next pass."""
    cache = empty_cache(config)
    cache.keys.normal_()
    cache.values.normal_()
    cache.commit(config.chunk)
    attend = CachedAttention(cache, student, config.grid, config.chunk)
    whole = config.chunk * config.tokens_per_frame
    for count in (whole, 3, whole):
        own_k, own_v = torch.randn(2, 1, count, *cache.keys.shape[-2:])
        past_k, past_v = attend.read(1)
        with torch.no_grad():
            keys, values = attend.after_past(1, own_k, own_v)
        assert torch.equal(keys, torch.cat((past_k, own_k), 1))
        assert torch.equal(values, torch.cat((past_v, own_v), 1))
        assert torch.equal(attend.past(1)[0], past_k)


@pytest.mark.parametrize(("sink", "full"), [(2, 2), (0, 1)])
def test_remembered_frames_weigh_less_but_for_the_sink_or_the_oldest(
    student: Student, config: ModelConfig, sink: int, full: int
) -> None:
    cache = empty_cache(replace(config, cache=CacheConfig(sink=sink, window=4, past_weight=0.3)))
    cache.keys.normal_()
    cache.values.normal_()
    cache.commit(4)
    attend, own = CachedAttention(cache, student, config.grid, config.chunk), config.chunk * config.tokens_per_frame
    q, k, v = torch.randn(3, 1, own, *cache.keys.shape[-2:])
    with torch.no_grad():
        made = attend(1, q, k, v)
        past_k, past_v = attend.read(1)
    keys, values = torch.cat((past_k, rotate(k, attend.rows)), 1), torch.cat((past_v, v), 1)
    scores = torch.einsum("bqhd,bkhd->bhqk", rotate(q, attend.rows), keys) * q.shape[-1] ** -0.5
    weights = torch.full((4, config.tokens_per_frame), 0.3)
    weights[:full] = 1
    shares = scores.exp() * torch.cat((weights.flatten(), torch.ones(own)))
    expected = torch.einsum("bhqk,bkhd->bqhd", shares / shares.sum(-1, keepdim=True), values)
    torch.testing.assert_close(made, expected, atol=1e-5, rtol=1e-5)
