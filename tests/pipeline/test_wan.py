"""A tiny Wan student through the engine: first-frame rule, both codecs, schedules, cache rules, tiles."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan

from pipeline.attention import CachedAttention
from pipeline.chunk import Chunk, Controls
from pipeline.codec import pixels_to_frames, to_bytes
from pipeline.config import CacheConfig, CodecConfig, ModelConfig, RegionConfig, SamplerConfig
from pipeline.engine import Engine
from pipeline.errors import PipelineError
from pipeline.kv_cache import KVCache
from pipeline.prompts import Prompts
from pipeline.sampler import clean_from_flow, draw_noise, levels, mix
from pipeline.student import Student
from pipeline.tiny_codec import TinyDecoder, TinyEncoder
from pipeline.wan import WanPair
from pipeline.wan_codec import WanCodec
from tests.pipeline.conftest import stir

RED = Controls("red ball")


@pytest.fixture(scope="module")
def config(config: ModelConfig) -> ModelConfig:
    return replace(
        config,
        chunk=3,
        student=replace(config.student, in_channels=4, control_channels=0),
        codec=CodecConfig(latent_channels=4, spatial_stride=8, first_alone=True),
        sampler=SamplerConfig(shift=5.0),
        cache=CacheConfig(sink=3, window=6, positions="stream"),
        regions=RegionConfig(carry="clean"),
    )


@pytest.fixture(scope="module")
def pairs() -> dict[str, WanPair]:
    """mixed: of a file with a tiny decoder alone."""
    torch.manual_seed(4)
    vae = WanCodec(
        AutoencoderKLWan(
            base_dim=8, z_dim=4, dim_mult=[1, 2, 2, 2], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
        )
    )
    decoder, encoder = TinyDecoder(4, (16, 8, 8, 8)), TinyEncoder(4, 8)
    made = {"full": WanPair(vae, vae), "mixed": WanPair(vae, decoder), "tiny": WanPair(encoder, decoder)}
    return {name: pair.eval().requires_grad_(False) for name, pair in made.items()}


@pytest.fixture(scope="module")
def pair(pairs: dict[str, WanPair]) -> WanPair:
    return pairs["tiny"]


@pytest.fixture(scope="module")
def student(config: ModelConfig) -> Student:
    torch.manual_seed(0)
    made = Student(config.student).eval().requires_grad_(False)
    stir(made, 0.2)
    return made


def read(prompt: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(prompt) + ord(prompt[:1] or " "))
    return torch.randn(4, 16, generator=generator)


@pytest.fixture(scope="module")
def engine(config: ModelConfig, pair: WanPair, student: Student) -> Engine:
    return Engine(config, pair, Prompts(read, 6), student)


def run(engine: Engine, count: int, controls: Controls = RED) -> list[Chunk]:
    state = engine.open(controls.seed)
    return [engine.step(state, controls) for _ in range(count)]


def pictures(config: ModelConfig, count: int, seed: int = 0) -> np.ndarray:
    shape = (count, config.height, config.width, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_cross_attention_keys_are_made_once_for_a_prompt_and_for_no_chunk_or_pass_of_their_own(engine: Engine) -> None:
    blocks, made = engine.student.model.blocks, list[int]()
    layers = [layer for block in blocks for layer in (block.attn2.to_k, block.attn2.to_v)]
    hooks = [layer.register_forward_hook(lambda *_: made.append(1)) for layer in layers]
    blue = replace(RED, prompt="a blue ball")
    engine.text.embed(blue.prompt)  # so that no chunk is drawn under the words before
    state = engine.open(7)

    def made_by(*controls: Controls) -> list[float]:
        counts = []
        for each in controls:
            made.clear()
            engine.step(state, each)
            counts.append(len(made) / len(layers))
        return counts

    assert made_by(RED, RED, RED) == [1, 0, 0]
    assert made_by(blue, replace(blue, strength=0.5), blue) == [1, 0, 0]
    assert made_by(RED, RED) == [1, 0], "a stream keeps those of one prompt"
    assert made_by(*[replace(blue, transition="glide", glide_chunks=2)] * 3) == [1, 1, 0]
    assert made_by(*[replace(RED, transition="recache")] * 2) == [1, 0]
    engine.reset(state, 8)
    assert made_by(RED, RED) == [1, 0]
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("which", ["full", "tiny"])
def test_the_first_chunk_has_fewer_pictures_and_the_stream_is_the_whole_decoded_at_once(
    config: ModelConfig, pairs: dict[str, WanPair], student: Student, which: str
) -> None:
    codec = pairs[which]
    chunks = run(Engine(config, codec, Prompts(read, 6), student), 3)
    assert [len(chunk.frames_THWC) for chunk in chunks] == [9, 12, 12]
    assert [config.pictures(index) for index in range(3)] == [9, 12, 12]
    clip = torch.from_numpy(np.concatenate([chunk.latents_TCHW for chunk in chunks]))
    whole = to_bytes(codec.decode_push(codec.remember(), clip)).permute(0, 2, 3, 1).numpy().astype(int)
    made = np.concatenate([chunk.frames_THWC for chunk in chunks]).astype(int)
    assert np.abs(made - whole).max() <= 1


@pytest.mark.parametrize("which", ["mixed", "tiny"])
def test_a_source_is_encoded_as_one_clip_from_the_newest_pictures_of_its_first_chunk(
    config: ModelConfig, pairs: dict[str, WanPair], student: Student, which: str
) -> None:
    encoder = pairs[which].encoder
    engine = Engine(config, pairs[which], Prompts(read, 6), student)
    clip, keep = pictures(config, 36), replace(RED, strength=0.0)
    state = engine.open(7)
    made = [engine.step(state, keep, part).latents_TCHW for part in np.split(clip, 3)]
    whole = encoder.encode_push(encoder.remember(), pixels_to_frames(torch.from_numpy(clip[3:])))
    assert whole is not None
    np.testing.assert_allclose(np.concatenate(made), whole.numpy(), atol=1e-5)
    short = engine.step(engine.open(7), keep, clip[3:12]).latents_TCHW
    np.testing.assert_allclose(short, made[0], atol=1e-5)
    with pytest.raises(PipelineError, match="9, 64, 96, 3"):
        engine.step(engine.open(7), keep, clip[:10])
    with pytest.raises(PipelineError, match="12, 64, 96, 3"):
        engine.step(state, keep, clip[:9])


def test_a_picture_to_begin_with_is_the_first_chunk_and_the_stream_goes_on_from_it(
    engine: Engine, config: ModelConfig
) -> None:
    image = np.repeat(pictures(config, 1), 9, 0)
    state = engine.open(7)
    engine.step(state, replace(RED, strength=0.0), image)
    follows = engine.step(state, RED)
    assert len(follows.frames_THWC) == 12
    assert np.abs(follows.latents_TCHW - run(engine, 2)[1].latents_TCHW).max() > 1e-4


def test_a_reset_stream_equals_a_fresh_one(engine: Engine, config: ModelConfig) -> None:
    state = engine.open(3)
    for source in (pictures(config, 12), None, pictures(config, 12)):
        engine.step(state, replace(RED, seed=3), source)
    engine.reset(state, 7)
    for chunk in run(engine, 2):
        again = engine.step(state, RED)
        assert np.array_equal(again.frames_THWC, chunk.frames_THWC)


def test_the_stream_goes_on_under_the_old_words_until_the_new_ones_are_read(
    config: ModelConfig, pair: WanPair, student: Student
) -> None:
    import threading

    gate = threading.Event()

    def slowly(prompt: str) -> torch.Tensor:
        assert prompt == "red" or gate.wait(30)
        return read(prompt)

    text = Prompts(slowly, 6)
    engine = Engine(config, pair, text, student)
    state, red, blue = engine.open(7), Controls("red"), Controls("blue")
    seen = [engine.step(state, controls).prompt for controls in (red, blue, blue)]
    gate.set()
    text.embed("blue")
    seen.append(engine.step(state, blue).prompt)
    assert seen == ["red", "red", "red", "blue"]


def test_without_a_pass_of_its_own_the_last_denoise_pass_writes_the_past(
    config: ModelConfig, pair: WanPair, student: Student
) -> None:
    told: list[str] = []

    class Note:
        def __init__(self, stage: str) -> None:
            told.append(stage)

        def __enter__(self) -> None: ...
        def __exit__(self, *_: object) -> None: ...

    lean = replace(config, cache=replace(config.cache, clean_pass=False))
    engine = Engine(lean, pair, Prompts(read, 6), student, trace=Note)
    state = engine.open(7)
    engine.step(state, RED)
    assert "cache" not in told and told.count("denoise_3") == 1
    # The same by hand: the last pass saw these latents at this level.
    cache = KVCache.of(lean)
    attend = CachedAttention(cache, student, lean.grid, 3)
    text = student.text_kv(engine.text.embed(RED.prompt))
    shape = (1, 3, 4, *lean.latent_size)
    clean = torch.zeros(shape)
    for step, sigma in enumerate(levels(lean.sampler)):
        noisy = mix(clean, draw_noise(shape, 7, 0, step), sigma)
        attend.writing = step == 3
        clean = clean_from_flow(noisy, student.predict(noisy, sigma, text, attend), sigma)
    cache.commit(3)
    for layer in range(config.student.num_layers):
        for ours, theirs in zip(state.cache.read(layer), cache.read(layer), strict=True):
            torch.testing.assert_close(ours, theirs)
    # A source that is kept as it is has no denoise pass, so its past is written by one of its own.
    engine.step(state, replace(RED, strength=0.0), pictures(config, 12))
    assert told.count("cache") == 1


@torch.inference_mode()  # which chooses how attention is reckoned
def test_a_window_that_is_written_again_for_each_chunk_equals_a_past_that_is_made_of_nothing_each_time(
    config: ModelConfig, pair: WanPair, student: Student
) -> None:
    config = replace(config, cache=CacheConfig(sink=0, window=3, rewrites=True, past_weight=0.3))
    engine, blue = Engine(config, pair, Prompts(read, 6), student), Controls("blue ball in the park")
    engine.text.embed(blue.prompt)  # read, so that it is drawn at once
    state, shape = engine.open(7), (1, 3, 4, *config.latent_size)
    latents, pictures, words = torch.zeros(0, *shape[2:]), np.zeros((0, config.height, config.width, 3), np.uint8), None
    for index in range(10):
        controls = RED if index < 5 else blue
        cache = KVCache.of(config)
        if words is not None:
            context = latents[-3:].clone()
            if index > 1:  # nothing is before the oldest of the last nine pictures, as before a stream's first
                oldest = pair.encode_push(pair.remember(), pixels_to_frames(torch.from_numpy(pictures[-9:-8])))
                assert oldest is not None
                context[:1] = oldest
            attend = CachedAttention(cache, student, config.grid, 3)
            attend.writing = True
            student.predict(context[None], 0.0, words, attend)  # under the words that its frames were drawn from
            cache.commit(3)
        words, attend = (
            student.text_kv(engine.text.embed(controls.prompt)),
            CachedAttention(cache, student, config.grid, 3),
        )
        clean = torch.zeros(shape)
        for step, sigma in enumerate(levels(config.sampler)):
            noisy = mix(clean, draw_noise(shape, 7, index, step), sigma)
            clean = clean_from_flow(noisy, student.predict(noisy, sigma, words, attend), sigma)
        made = engine.step(state, controls)
        np.testing.assert_allclose(made.latents_TCHW, clean[0].numpy(), atol=2e-5, rtol=2e-5, err_msg=f"chunk {index}")
        latents = torch.cat((latents, torch.from_numpy(made.latents_TCHW)))
        pictures = np.concatenate((pictures, made.frames_THWC))
    painted = engine.step(state, replace(blue, regions=0.5)), engine.step(state, replace(blue, paint="1" + "0" * 5))
    assert np.array_equal(painted[1].frames_THWC[-1][32:, 64:], painted[0].frames_THWC[-1][32:, 64:])


def test_the_first_chunk_may_take_other_steps_and_a_viewer_any_where_the_model_knows_any(
    config: ModelConfig, pair: WanPair, student: Student
) -> None:
    def passes(sampler: SamplerConfig, *controls: Controls) -> list[int]:
        told: list[str] = []

        class Note:
            def __init__(self, stage: str) -> None:
                told.append(stage)

            def __enter__(self) -> None: ...
            def __exit__(self, *_: object) -> None: ...

        engine = Engine(replace(config, sampler=sampler), pair, Prompts(read, 6), student, trace=Note)
        state, counts = engine.open(7), []
        for each in controls:
            told.clear()
            engine.step(state, each)
            counts.append(sum(stage.startswith("denoise") for stage in told))
        return counts

    two = SamplerConfig(shift=5.0, steps=(1000, 500), first_steps=(1000, 750, 500, 250))
    assert passes(two, RED, RED, RED) == [4, 2, 2]
    free = SamplerConfig(any_steps=True)
    assert passes(free, RED, replace(RED, steps=1), replace(RED, steps=8)) == [4, 1, 8]
    over = SamplerConfig(shift=1.0, steps=(700, 500, 400, 200))
    assert passes(over, RED) == [4]  # from pure noise, though the schedule was made for a video
    with pytest.raises(PipelineError, match="knows no other"):
        passes(two, replace(RED, steps=3))


@pytest.mark.parametrize("which", ["full", "tiny"])
def test_held_tiles_keep_their_pixels_whichever_the_codec_is(
    config: ModelConfig, pairs: dict[str, WanPair], student: Student, which: str
) -> None:
    engine = Engine(config, pairs[which], Prompts(read, 6), student)
    for source in (None, pictures(config, 12)):
        state, dial = engine.open(7), replace(RED, regions=0.5)
        engine.step(state, dial, source)
        before = engine.step(state, dial, source).frames_THWC[-1]
        painted = engine.step(state, replace(RED, paint="1" + "0" * 5), source)
        assert painted.active_HW is not None and painted.active_HW.sum() == 1
        assert np.array_equal(painted.frames_THWC[-1][32:, 64:], before[32:, 64:])
        assert not np.array_equal(painted.frames_THWC[-1][:32, :32], before[:32, :32])


@pytest.mark.parametrize(
    ("width", "height"),
    [(832, 480), (480, 832), (512, 512), (320, 576), (80, 48)],
)
def test_a_stream_has_the_size_that_was_asked_for(config: ModelConfig, width: int, height: int) -> None:
    """A layer of few channels: the shapes are those of the real model, and its time is not. Tiles are 32 pixels."""
    torch.manual_seed(5)
    vae = AutoencoderKLWan(
        base_dim=2, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    )
    small = replace(config.student, num_attention_heads=1, ffn_dim=16, num_layers=1)
    sized = replace(
        config,
        width=width,
        height=height,
        chunk=1,
        student=small,
        sampler=SamplerConfig(shift=1.0, steps=(700,)),
        cache=CacheConfig(sink=1, window=1, clean_pass=False),
    )
    codec = WanPair(WanCodec(vae), TinyDecoder(4, (4, 4, 4, 4))).eval().requires_grad_(False)
    engine = Engine(sized, codec, Prompts(read, 6), Student(small).eval().requires_grad_(False))
    state = engine.open(7)
    for count in (1, 4):
        chunk = engine.step(state, replace(RED, strength=0.7, regions=0.5), pictures(sized, count))
        assert chunk.frames_THWC.shape == (count, height, width, 3)
        assert chunk.latents_TCHW.shape == (1, 4, height // 8, width // 8)
        assert np.isfinite(chunk.latents_TCHW).all() and np.ptp(chunk.frames_THWC) > 0
    assert sized.tiles == (None if width == 80 else (height // 32, width // 32))
    if sized.tiles:
        painted = engine.step(state, replace(RED, paint="1" + "0" * (height * width // 32**2 - 1)))
        assert painted.active_HW is not None and painted.active_HW.sum() == 1
        assert np.array_equal(painted.frames_THWC[-1][96:, 96:], chunk.frames_THWC[-1][96:, 96:])
        assert not np.array_equal(painted.frames_THWC[-1][:32, :32], chunk.frames_THWC[-1][:32, :32])


def test_half_precision_goes_through_all_of_it(config: ModelConfig, pair: WanPair) -> None:
    import copy

    torch.manual_seed(0)
    half = Student(config.student).eval().requires_grad_(False)
    stir(half, 0.2)
    for value in half.parameters():
        value.data = value.data.bfloat16()
    engine = Engine(config, copy.deepcopy(pair).bfloat16(), Prompts(read, 6), half)
    state = engine.open(7)
    for controls, source in ((RED, None), (RED, pictures(config, 12)), (replace(RED, regions=0.5), None)):
        chunk = engine.step(state, controls, source)
        assert chunk.latents_TCHW.dtype == np.float32 and np.isfinite(chunk.latents_TCHW).all()
    assert state.cache.keys.dtype == torch.bfloat16
