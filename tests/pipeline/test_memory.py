"""The reckoning of memory against the modules themselves, and its refusals."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan

from pipeline.attention import CachedAttention
from pipeline.bases import BASES, TINY_DECODER, TINY_ENCODER, TextWeights
from pipeline.config import ModelConfig, load_config
from pipeline.errors import PipelineError
from pipeline.family import Family
from pipeline.kv_cache import KVCache
from pipeline.memory import Room, Setup, amount, choose, parameters, plan, student_bytes, text_bytes, ways
from pipeline.models import FAMILIES, family
from pipeline.region_cache import RegionCache
from pipeline.student import Student
from pipeline.tiny_codec import TinyDecoder, TinyEncoder
from pipeline.umt5 import load_umt5
from pipeline.wan_codec import WanCodec
from pipeline.weights import load_transformer, pocket_folder, save_transformer
from tests.app.tiny_wan import SHAPE, write_text

LONG = family("longlive")
GPU = Setup(width=832, height=480)


@pytest.mark.parametrize(
    ("base", "billions", "names"),
    [
        ("pocket", 0.004, None),
        ("wan-1.3b", 1.419, 825),
        ("wan-14b", 14.288, 1095),
        ("anyflow-1.3b", 1.422, 831),
        ("anyflow-14b", 14.317, 1101),
    ],
)
def test_weights_are_counted_as_the_modules_have_them(base: str, billions: float, names: int | None) -> None:
    shape = BASES[base].shape
    with torch.device("meta"):
        student = Student(shape)
    assert parameters(shape) == sum(value.numel() for value in student.parameters())
    assert parameters(shape) / 1e9 == pytest.approx(billions, abs=6e-4)
    assert names is None or len(student.state_dict()) == names


def test_wans_autoencoder_and_the_tiny_codec_are_counted_with_all_that_they_remember_of_a_stream() -> None:
    with torch.device("meta"):
        vae, tiny, tiny_encoder = WanCodec(AutoencoderKLWan()), TinyDecoder(), TinyEncoder()
        pictures, latents = torch.empty(9, 3, 64, 32), torch.empty(3, 16, 8, 4)
    full = BASES["wan-14b"].codec
    assert full.weights == sum(value.numel() for value in vae.parameters())
    assert TINY_DECODER.weights == sum(value.numel() for value in tiny.parameters())
    assert TINY_ENCODER.weights == sum(value.numel() for value in tiny_encoder.parameters())
    encoder, decoder, quick, quick_encoder = vae.remember(), vae.remember(), tiny.remember(), tiny_encoder.remember()
    vae.encode_push(encoder, pictures)
    vae.decode_push(decoder, latents)
    tiny.decode_tiles(quick, latents, None)
    tiny_encoder.encode_tiles(quick_encoder, pictures[:8], None)

    def held(values: Iterable[object]) -> float:
        return sum(value.numel() for value in values if isinstance(value, torch.Tensor)) / (64 * 32)

    assert held(encoder.seen) == full.encoder
    assert held(decoder.seen) == full.decoder
    for memory, counted in ((quick, TINY_DECODER.decoder), (quick_encoder, TINY_ENCODER.encoder)):
        assert held(rims[:, :-1] for rims in (*memory.rims, *memory.glance)) + held(memory.past) == counted


def test_wans_text_encoder_is_counted_as_transformers_has_it() -> None:
    from transformers import UMT5Config, UMT5EncoderModel

    # UMT5-XXL's encoder: 24 layers of 4096 channels, and a table of 256384 pieces of words.
    xxl = UMT5Config(vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)
    with torch.device("meta"):
        network = UMT5EncoderModel(xxl)
    layers = [layer.weight for layer in network.modules() if type(layer) is torch.nn.Linear]
    text = BASES["wan-1.3b"].text
    assert text.layers == sum(weight.numel() for weight in layers)
    assert text.rows == sum(len(weight) for weight in layers)
    assert text.tables + text.layers == sum(value.numel() for value in network.parameters())
    parts = [part for block in network.encoder.block for part in block.layer]
    assert text.widest == max(sum(value.numel() for value in part.parameters()) for part in parts)


def test_a_text_encoder_takes_the_room_that_is_reckoned_in_both_precisions(tmp_path: Path) -> None:
    write_text(tmp_path)
    room = {}
    for bits in (16, 8):
        network = load_umt5(tmp_path / "text_encoder", tmp_path / "tokenizer", bits=bits).network
        held = {id(value): value.nbytes for value in (*network.parameters(), *network.buffers())}
        room[bits] = sum(held.values())
    layers = 2 * (4 * 32 * 32 + 3 * 32 * 48)
    text = TextWeights(room[16] // 2 - layers, layers, rows=2 * (4 * 32 + 2 * 48 + 32))
    assert {bits: text_bytes(text, bits) for bits in room} == room


@pytest.mark.parametrize("far", [{}, {"compressed_patch_size": (1, 4, 4), "full_chunk_limit": 3, "gate_value": 0.5}])
def test_a_student_takes_the_room_that_is_reckoned_in_both_precisions(far: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = replace(SHAPE, **far, deltatime_type="r" if far else None)
    save_transformer(tmp_path, Student(shape))
    for bits in (16, 8):
        student = load_transformer(tmp_path, shape, torch.bfloat16, bits=bits)
        rope = sum(value.nbytes for value in student.model.rope.buffers())
        held = sum(value.nbytes for value in (*student.parameters(), *student.buffers()))
        assert student_bytes(shape, 2, bits) == held - rope


def test_eight_bits_of_the_text_encoder_make_it_smaller_and_nothing_else() -> None:
    full, small = (plan(LONG, replace(GPU, text_bits=bits)) for bits in (16, 8))
    assert replace(small, setup=full.setup, text=full.text) == full
    assert (round(full.text / 1e9, 1), round(small.text / 1e9, 1)) == (11.4, 6.7)


def test_the_past_is_as_large_as_what_a_stream_remembers() -> None:
    shape = LONG.shape
    tokens, pixels = 30 * 52, 832 * 480
    cache = KVCache(LONG.cache, shape.num_layers, tokens, 12, 128, device="meta", dtype=torch.bfloat16)
    prompt = 2 * shape.num_layers * 512 * 1536 * 2
    seen = 2 * (1404 + 2364.5) * pixels
    assert plan(LONG, GPU).past == cache.keys.nbytes + cache.values.nbytes + prompt + seen
    far = family("anyflow-far")
    fine = KVCache.of(far.config(832, 480), device="meta", dtype=torch.bfloat16)
    assert fine.coarse is not None and fine.coarse.keys.shape[2:4] == (12, tokens // 4)
    held = sum(part.keys.nbytes + part.values.nbytes for part in (fine, fine.coarse))
    assert plan(far, GPU).past == held + prompt + seen


def test_beside_a_tiny_decoder_the_autoencoder_counts_only_where_it_has_to_encode() -> None:
    pixels, vae = 832 * 480, BASES[LONG.base].codec
    full, tiny, half = (
        plan(LONG, each) for each in (GPU, replace(GPU, tiny=True), replace(GPU, tiny=True, tiny_encodes=False))
    )
    assert full.codec == 2 * vae.weights
    assert tiny.codec == 2 * (TINY_DECODER.weights + TINY_ENCODER.weights)
    assert half.codec == 2 * (TINY_DECODER.weights + vae.weights)
    assert full.past - half.past == 2 * (2364.5 - TINY_DECODER.decoder) * pixels
    assert half.past - tiny.past == 2 * (1404 - TINY_ENCODER.encoder) * pixels


def test_a_cpu_also_keeps_the_past_rotated_with_room_for_a_chunk(config: ModelConfig, student: Student) -> None:
    cache = KVCache.of(config)
    cache.written = config.cache.sink + config.cache.window  # full
    attend = CachedAttention(cache, student, config.grid, config.chunk)
    attend.past(0)
    rooms = sum(room.nbytes for room in attend._rooms[0])
    frames = config.cache.sink + config.cache.window + config.chunk
    heads = config.student.num_attention_heads * config.student.attention_head_dim
    assert rooms == 4 * 2 * frames * config.tokens_per_frame * heads
    single, half = (plan(LONG, replace(GPU, cpu=cpu)).past for cpu in (True, False))
    assert single - 2 * half == 4 * 2 * 30 * LONG.attends * 30 * 52 * 1536


def test_regions_that_keep_the_keys_of_every_pass_are_counted() -> None:
    row = family("pocket")
    regions = RegionCache(load_config(pocket_folder() / "config.json"))
    kept = regions.keys.nbytes + regions.values.nbytes
    sized = Setup(width=320, height=192)
    assert plan(row, sized).past - plan(replace(row, carry="clean"), sized).past == kept > 0


def test_low_rank_weights_are_held_in_the_machine_and_the_largest_is_worn_on_the_device() -> None:
    bare, worn = plan(LONG, GPU), plan(LONG, replace(GPU, loras=(300, 100)))
    assert (worn.device - bare.device, worn.host) == (300, 400)
    bare, worn = plan(LONG, replace(GPU, cpu=True)), plan(LONG, replace(GPU, cpu=True, loras=(300, 100)))
    assert (worn.device - bare.device, worn.host) == (600 + 400, 0)


def test_each_worker_has_a_model_of_its_own() -> None:
    one, three = (plan(LONG, replace(GPU, text_on="cpu", workers=workers)) for workers in (1, 3))
    assert (three.device, three.host) == (3 * one.device, 3 * one.host)


def test_with_the_text_encoder_on_the_cpu_the_codec_stays_on_the_gpu() -> None:
    whole, lean = (plan(LONG, replace(GPU, text_on=place)) for place in ("beside", "cpu"))
    assert whole.device - lean.device == whole.text
    assert whole.host == 0
    assert lean.host == lean.text + 4 * BASES[LONG.base].text.widest


def test_a_swapped_text_encoder_is_held_in_the_machine_and_its_largest_layer_counts_on_the_gpu() -> None:
    lean, swapped = (plan(LONG, replace(GPU, text_on=place, workers=2)) for place in ("cpu", "swap"))
    assert swapped.device - lean.device == 2 * 2 * BASES[LONG.base].text.widest
    assert swapped.host == 2 * swapped.text
    assert choose(LONG, swapped.setup, Room(swapped.device, swapped.host)) == swapped
    for room in (Room(swapped.device - 1, swapped.host), Room(swapped.device, swapped.host - 1)):
        assert not swapped.fits(room)


@pytest.mark.parametrize("cpu", [True, False])
def test_a_text_encoder_on_a_device_of_its_own_takes_room_there_and_nowhere_else(cpu: bool) -> None:
    setup = replace(GPU, cpu=cpu, text_on="cuda:1")
    apart, beside = plan(LONG, setup), plan(LONG, replace(setup, text_on="beside"))
    assert (apart.apart, beside.apart) == (apart.text, 0)
    assert beside.device - apart.device == beside.text + beside.reading
    assert apart.host == 0
    assert f"and {amount(apart.text)} on cuda:1" in apart.wants and apart.title == "text encoder on cuda:1"
    host_free = None if cpu else 0
    assert choose(LONG, setup, Room(apart.device, host_free, apart.text)) == apart
    with pytest.raises(PipelineError) as refused:
        choose(LONG, setup, Room(apart.device, host_free, apart.text - 1))
    assert f"{amount(apart.text)} on the text encoder's device" in refused.value.message
    assert refused.value.remedy == "Add --text-bits 8, which fits."
    with pytest.raises(PipelineError) as refused:
        choose(LONG, setup, Room(apart.device, host_free))
    assert "another --text-device" in refused.value.remedy


def test_where_the_text_encoder_is_asked_to_be_there_is_no_other_way() -> None:
    assert [each.setup.text_on for each in ways(LONG, GPU)[:2]] == ["beside", "cpu"]
    for place in ("beside", "cpu", "swap", "cuda:1"):
        assert {each.setup.text_on for each in ways(LONG, replace(GPU, text_on=place))} == {place}
    for place in ("auto", "cpu", "swap"):
        assert {each.setup.text_on for each in ways(LONG, replace(GPU, cpu=True, text_on=place))} == {"beside"}


@pytest.mark.parametrize("row", FAMILIES, ids=lambda row: row.name)
def test_every_family_can_be_reckoned_at_several_sizes(row: Family) -> None:
    sizes = [
        plan(row, Setup(width=width, height=height)).device
        for width, height in ((320, 192), (320, 576), (512, 512), (832, 480), (480, 832))
    ]
    assert sizes[0] < sizes[1] < sizes[2] < sizes[3] == sizes[4]


def test_what_fits_is_chosen_and_the_text_encoder_gives_way_first() -> None:
    whole, lean = ways(LONG, GPU)[:2]
    assert choose(LONG, GPU, Room(whole.device, 0)) == whole
    assert choose(LONG, GPU, Room(whole.device - 1, lean.host)) == lean
    small = replace(GPU, text_bits=8)
    assert choose(LONG, small, Room(whole.device - 10**9, 0)).setup == replace(small, text_on="beside")


@pytest.mark.parametrize("cpu", [True, False])
def test_what_does_not_fit_is_refused_with_the_numbers_of_every_way(cpu: bool) -> None:
    setup = replace(GPU, cpu=cpu)
    plans, room = ways(LONG, setup), Room(10**9, None if cpu else 2 * 10**9)
    assert len(plans) == (3 if cpu else 6)
    with pytest.raises(PipelineError) as refused:
        choose(LONG, setup, room)
    assert refused.value.code == "memory_short"
    for part in ("1.0 GB", *(f"{each.title}: {each.wants}" for each in plans)):
        assert part in refused.value.message
    assert "fits" not in refused.value.message
    assert refused.value.remedy.startswith("Choose a smaller model")


def test_the_first_flags_that_would_fit_are_named() -> None:
    plans = ways(LONG, GPU)
    for fitting, flags in ((plans[2], "--text-bits 8"), (plans[5], "--bits 8 --text-bits 8")):
        with pytest.raises(PipelineError) as refused:
            choose(LONG, GPU, Room(fitting.device, fitting.host))
        assert refused.value.remedy == f"Add {flags}, which fits."
        assert f"{fitting.title}: {fitting.wants}, fits" in refused.value.message
    with pytest.raises(PipelineError) as refused:
        choose(LONG, replace(GPU, workers=4), Room(10**9, 10**9))
    assert "fewer workers than 4" in refused.value.remedy


@pytest.mark.parametrize(("width", "height"), [(830, 480), (832, 470), (0, 480), (832, -16), (8, 8)])
def test_a_size_that_does_not_divide_into_tokens_is_refused_with_one_that_does(width: int, height: int) -> None:
    with pytest.raises(PipelineError) as refused:
        plan(family("self-forcing"), Setup(width=width, height=height))
    assert refused.value.code == "size_invalid"
    assert "multiples of 16" in refused.value.remedy


@pytest.mark.parametrize("row", [row for row in FAMILIES if row.layout == "wan"], ids=lambda row: row.name)
def test_a_multiple_of_16_is_enough_but_for_those_with_a_coarse_past_which_say_32(row: Family) -> None:
    setup = Setup(width=528, height=496)
    if not row.coarse:
        assert plan(row, setup).device > 0
        assert row.config(528, 496).latent_size == (62, 66)
        return
    with pytest.raises(PipelineError) as refused:
        plan(row, setup)
    assert refused.value.code == "size_invalid"
    assert refused.value.remedy == "Choose multiples of 32, such as 512x480."
