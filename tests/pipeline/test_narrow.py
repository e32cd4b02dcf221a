"""Networks that are held in fewer bytes compute nearly what they compute in full, and are filled to the last name."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.adapters import Worn, read_adapter
from pipeline.chunk import Controls
from pipeline.codec import PocketCodec
from pipeline.config import ModelConfig
from pipeline.engine import Engine
from pipeline.narrow import Copied, EightBitLinear, fill
from pipeline.student import Student
from pipeline.text import TextEncoder
from pipeline.weights import load_transformer, save_transformer
from tests.pipeline.published import peft_lora


@pytest.fixture
def folder(student: Student, tmp_path: Path) -> Path:
    save_transformer(tmp_path, student)
    return tmp_path


@torch.inference_mode()
def test_a_student_in_eight_bits_draws_nearly_what_it_draws_in_full(
    folder: Path, config: ModelConfig, codec: PocketCodec, text: TextEncoder, student: Student
) -> None:
    small = load_transformer(folder, config.student, bits=8).eval().requires_grad_(False)
    layers = [layer for layer in small.modules() if isinstance(layer, EightBitLinear)]
    assert len(layers) == config.student.num_layers * 10
    assert {layer.weight.dtype for layer in layers} == {torch.int8}
    assert small.dtype == torch.float32
    drawn = []
    for each in (student, small):
        engine = Engine(config, codec, text, each)
        state = engine.open(7)
        drawn.append([torch.from_numpy(engine.step(state, Controls("red ball")).latents_TCHW) for _ in range(4)])
    for full, narrow in zip(*drawn, strict=True):
        assert 0.995 < torch.cosine_similarity(full.flatten(), narrow.flatten(), dim=0) < 1


def test_low_rank_weights_are_worn_on_eight_bits_too(folder: Path, config: ModelConfig) -> None:
    small = load_transformer(folder, config.student, bits=8).requires_grad_(False)
    name = "blocks.0.attn1.to_q"
    save_file(peft_lora([name], {f"{name}.weight": torch.Size((24, 24))}), folder / "lora.safetensors")
    adapter = read_adapter(folder / "lora.safetensors", config.student)
    layer, x = small.model.get_submodule(name), torch.randn(3, 24)
    before = layer(x)
    worn = Worn(small, adapter)
    torch.testing.assert_close(layer(x) - before, x @ adapter[name].added(1.0).T)
    worn.take_off()
    assert torch.equal(layer(x), before)


def test_a_layer_in_bfloat16_computes_in_single_precision_and_stays_in_bfloat16() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 4).bfloat16(), torch.randn(3, 8)
    wide = nn.Linear(8, 4)
    wide.load_state_dict({name: value.float() for name, value in layer.state_dict().items()})
    assert torch.equal(Copied(layer, torch.device("cpu"), torch.float32)(x), wide(x))
    assert {value.dtype for value in layer.parameters()} == {torch.bfloat16}


def test_a_network_is_filled_to_the_last_name_and_only_inside_what_is_named_in_bytes() -> None:
    torch.manual_seed(0)

    def network() -> nn.Module:
        return nn.ModuleDict({"inner": nn.Sequential(nn.Linear(8, 4)), "outer": nn.Linear(8, 4)})

    whole = network().state_dict()
    for missing in ("inner.0.bias", "outer.weight"):
        values: dict[str, Tensor] = {name: value for name, value in whole.items() if name != missing}
        with torch.device("meta"):
            made = network()
        with pytest.raises(RuntimeError, match=missing):
            fill(made, values.items(), torch.bfloat16, bits=8, inside="inner")
    with torch.device("meta"):
        made = network()
    fill(made, whole.items(), torch.bfloat16, bits=8, inside="inner")
    assert [type(layer) for layer in made.modules() if hasattr(layer, "weight")] == [EightBitLinear, nn.Linear]
    assert {value.dtype for value in made.parameters()} == {torch.bfloat16}
