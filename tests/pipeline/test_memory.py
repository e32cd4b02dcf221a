"""The reckoning of memory against the modules themselves, and its refusals."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file

from pipeline.errors import PipelineError
from pipeline.kv_cache import KVCache
from pipeline.memory import Plan, parameters, plan, text_bytes
from pipeline.models import BASES, FAMILIES, Family, TextWeights, family
from pipeline.student import Student
from pipeline.umt5 import load_umt5
from tests.app.tiny_wan import write_text


@pytest.mark.parametrize(
    ("base", "billions", "names"), [("pocket", 0.004, None), ("wan-1.3b", 1.419, 825), ("wan-14b", 14.288, 1095)]
)
def test_weights_are_counted_as_the_modules_have_them(base: str, billions: float, names: int | None) -> None:
    shape = BASES[base].shape
    with torch.device("meta"):
        student = Student(shape)
    assert parameters(shape) == sum(value.numel() for value in student.parameters())
    assert parameters(shape) / 1e9 == pytest.approx(billions, abs=6e-4)
    assert names is None or len(student.state_dict()) == names


def test_wans_autoencoder_is_counted_as_diffusers_has_it() -> None:
    with torch.device("meta"):
        codec = AutoencoderKLWan()
    assert BASES["wan-14b"].codec == sum(value.numel() for value in codec.parameters())


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


def test_a_text_encoder_takes_the_room_that_is_reckoned_in_both_precisions(tmp_path: Path) -> None:
    write_text(tmp_path)
    for path in (tmp_path / "text_encoder").glob("*.safetensors"):  # as the hub has it
        save_file({name: value.bfloat16() for name, value in load_file(path).items()}, path)
    room = {}
    for bits in (16, 8):
        network = load_umt5(tmp_path / "text_encoder", tmp_path / "tokenizer", bits=bits).network
        held = {id(value): value.nbytes for value in (*network.parameters(), *network.buffers())}
        room[bits] = sum(held.values())
    layers = 2 * (4 * 32 * 32 + 3 * 32 * 48)
    text = TextWeights(room[16] // 2 - layers, layers, rows=2 * (4 * 32 + 2 * 48 + 32))
    assert {bits: text_bytes(text, bits) for bits in room} == room


def test_eight_bits_of_the_text_encoder_make_what_is_beside_smaller_and_nothing_else() -> None:
    row = family("longlive")
    full, small = (plan(row, 832, 480, text_bits=bits) for bits in (16, 8))
    assert (full.student, full.past, full.work) == (small.student, small.past, small.work)
    assert (round(full.beside / 1e9, 1), round(small.beside / 1e9, 1)) == (11.6, 7.0)
    assert small.choose(full.whole - 10**9, None) == "whole"
    with pytest.raises(PipelineError) as refused:
        full.choose(full.whole - 10**9, None)
    assert "--text-bits 8" in refused.value.remedy


def test_the_past_is_as_large_as_the_cache_that_is_allocated() -> None:
    row = family("longlive")
    shape = row.shape
    tokens = 30 * 52
    cache = KVCache(row.cache, shape.num_layers, tokens, 12, 128, device="meta", dtype=torch.bfloat16)
    prompt = 2 * shape.num_layers * 512 * 1536 * 2
    assert plan(row, 832, 480).past == cache.keys.nbytes + cache.values.nbytes + prompt


@pytest.mark.parametrize("row", FAMILIES, ids=lambda row: row.name)
def test_every_family_can_be_reckoned_at_several_sizes(row: Family) -> None:
    sizes = [plan(row, width, height) for width, height in ((320, 192), (512, 512), (832, 480), (480, 832))]
    assert sizes[0].whole < sizes[1].whole < sizes[2].whole == sizes[3].whole


def test_what_fits_is_chosen_and_the_encoder_gives_way_first() -> None:
    asked = Plan("A model", student=3, past=2, work=1, beside=10)
    assert asked.choose(free=16, host_free=0) == "whole"
    assert asked.choose(free=6, host_free=10) == "lean"


@pytest.mark.parametrize(("free", "host_free"), [(5, 100), (6, 9)])
def test_what_does_not_fit_is_refused_with_the_numbers(free: int, host_free: int) -> None:
    asked = Plan("A model", student=3 * 10**9, past=2 * 10**9, work=10**9, beside=10 * 10**9)
    with pytest.raises(PipelineError) as refused:
        asked.choose(free * 10**9, host_free * 10**9)
    assert refused.value.code == "memory_short"
    for number in ("16.0 GB", "6.0 GB", "10.0 GB", f"{free}.0 GB", f"{host_free}.0 GB"):
        assert number in refused.value.message


@pytest.mark.parametrize(("width", "height"), [(830, 480), (832, 470), (0, 480), (832, -16), (8, 8)])
def test_a_size_that_does_not_divide_into_tokens_is_refused_with_one_that_does(width: int, height: int) -> None:
    with pytest.raises(PipelineError) as refused:
        plan(family("self-forcing"), width, height)
    assert refused.value.code == "size_invalid"
    assert "multiples of 16" in refused.value.remedy
