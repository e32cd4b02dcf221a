"""Low-rank weights in every usual file: merged, worn at a strength that changes, exchanged and taken off."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline.adapters import Worn, merged, read_adapter, read_adapters
from pipeline.chunk import Controls
from pipeline.config import ModelConfig
from pipeline.engine import Engine
from pipeline.errors import PipelineError
from pipeline.student import Student
from tests.pipeline.published import own_layout, peft_lora

LAYERS = ["blocks.0.attn1.to_q", "blocks.0.attn2.to_k", "blocks.1.attn1.to_out.0", "blocks.1.ffn.net.0.proj"]


@pytest.fixture
def thin(student: Student) -> dict[str, Tensor]:
    """As PEFT names them on Wan's own code."""
    return peft_lora(LAYERS, {name: value.shape for name, value in student.model.state_dict().items()})


def halves(thin: dict[str, Tensor]) -> list[tuple[str, Tensor, Tensor]]:
    values = list(thin.values())
    return [(layer, values[2 * index], values[2 * index + 1]) for index, layer in enumerate(LAYERS)]


def own(layer: str) -> str:
    return next(iter(own_layout({f"{layer}.weight": torch.zeros(())}))).removesuffix(".weight")


def diffusers_style(thin: dict[str, Tensor]) -> dict[str, Tensor]:
    named = {}
    for layer, down, up in halves(thin):
        named |= {f"transformer.{layer}.lora_A.weight": down, f"transformer.{layer}.lora_B.weight": up}
    return named


def own_style(thin: dict[str, Tensor]) -> dict[str, Tensor]:
    named = {}
    for layer, down, up in halves(thin):
        before = f"diffusion_model.{own(layer)}"
        named |= {f"{before}.lora_down.weight": down, f"{before}.lora_up.weight": up}
    return named


def flat_style(thin: dict[str, Tensor]) -> dict[str, Tensor]:
    named = {}
    for layer, down, up in halves(thin):
        before = "lora_unet_" + own(layer).replace(".", "_")
        # Half of the rank, on layers that add twice as much.
        named |= {f"{before}.lora_down.weight": down, f"{before}.lora_up.weight": 2 * up}
        named[f"{before}.alpha"] = torch.tensor(len(down) / 2)
    return named


def peft_style(thin: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace(".weight", ".default.weight"): value for name, value in thin.items()}


@pytest.mark.parametrize("style", [dict, peft_style, diffusers_style, own_style, flat_style])
def test_each_style_of_names_means_the_same_layers(
    style: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    thin: dict[str, Tensor],
    student: Student,
    config: ModelConfig,
    tmp_path: Path,
) -> None:
    save_file(style(thin), tmp_path / "lora.safetensors")
    adapter = read_adapter(tmp_path / "lora.safetensors", config.student)
    assert set(adapter) == set(LAYERS)
    for layer, down, up in halves(thin):
        torch.testing.assert_close(adapter[layer].added(0.5), up @ down * 0.5)


def forward(student: Student, config: ModelConfig) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(1, config.student.in_channels, 2, *config.latent_size, generator=generator)
    text = torch.randn(1, 5, config.student.text_dim, generator=generator)
    with torch.inference_mode():
        return student.model(latents, torch.tensor([700]), text, return_dict=False)[0]


def of(student: Student, config: ModelConfig, weights: dict[str, Tensor]) -> Student:
    made = Student(config.student).eval().requires_grad_(False)
    made.model.load_state_dict(weights)
    return made


def test_worn_is_as_merged_at_every_strength_and_taken_off_is_as_before(
    thin: dict[str, Tensor], student: Student, config: ModelConfig, tmp_path: Path
) -> None:
    save_file(thin, tmp_path / "lora.safetensors")
    adapter = read_adapter(tmp_path / "lora.safetensors", config.student)
    weights = dict(student.model.state_dict())
    bare = forward(student, config)
    worn = Worn(student, adapter)
    for strength in (1.0, 0.25, -0.5):
        worn.strength = strength
        assert worn.strength == strength
        merged_in = forward(of(student, config, merged(weights, adapter, strength)), config)
        torch.testing.assert_close(forward(student, config), merged_in, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(merged_in, bare, atol=1e-3)
    worn.strength = 0
    torch.testing.assert_close(forward(student, config), bare, atol=0, rtol=0)
    worn.strength = 1
    worn.take_off()
    assert torch.equal(forward(student, config), bare)
    assert all(torch.equal(value, weights[name]) for name, value in student.model.state_dict().items())


def test_two_can_be_worn_and_one_exchanged_for_another(
    thin: dict[str, Tensor], student: Student, config: ModelConfig, tmp_path: Path
) -> None:
    save_file(thin, tmp_path / "one.safetensors")
    save_file({name: -2 * value if "lora_B" in name else value for name, value in thin.items()}, tmp_path / "two.st")
    one, two = (read_adapter(tmp_path / name, config.student) for name in ("one.safetensors", "two.st"))
    bare = forward(student, config)
    first, second = Worn(student, one, 2.0), Worn(student, two, 1.0)
    torch.testing.assert_close(forward(student, config), bare, atol=1e-4, rtol=1e-4)
    first.take_off()
    weights = dict(student.model.state_dict())
    expected = forward(of(student, config, merged(weights, two)), config)
    torch.testing.assert_close(forward(student, config), expected, atol=1e-4, rtol=1e-4)
    second.take_off()
    assert torch.equal(forward(student, config), bare)


def test_a_stream_takes_a_change_up_with_its_next_chunk(
    thin: dict[str, Tensor], engine: Engine, config: ModelConfig, tmp_path: Path
) -> None:
    save_file(thin, tmp_path / "lora.safetensors")
    adapter = read_adapter(tmp_path / "lora.safetensors", config.student)

    def stream(worn_at: int | None) -> list[np.ndarray]:
        state, worn, chunks = engine.open(7), None, []
        for chunk in range(3):
            if chunk == worn_at:
                worn = Worn(engine.student, adapter, 3.0)
            chunks.append(engine.step(state, Controls("red ball")).latents_TCHW)
        if worn is not None:
            worn.take_off()
        return chunks

    plain, changed = stream(None), stream(1)
    assert np.array_equal(plain[0], changed[0])
    assert abs(plain[1] - changed[1]).max() > 1e-3
    assert all(map(np.array_equal, stream(None), plain))


def test_a_stream_whose_low_rank_weights_are_exchanged_chunk_by_chunk_equals_one_whose_student_is_exchanged(
    thin: dict[str, Tensor], engine: Engine, config: ModelConfig, tmp_path: Path
) -> None:
    """The twin goes on with another student each chunk: one with just those weights merged in, which makes the prompt's
    keys and values itself."""
    paths = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    save_file(thin, paths[0])
    save_file({name: -2 * value if "lora_B" in name else value for name, value in thin.items()}, paths[1])
    adapters = {path.stem: read_adapter(path, config.student) for path in paths}
    weights = {name: value.clone() for name, value in engine.student.model.state_dict().items()}
    parts = (engine.config, engine.codec, engine.text)
    ours = Engine(*parts, engine.student, adapters=adapters)
    state, twin = ours.open(7), ours.open(7)
    for name, strength in (("", 1.0), ("one", 1.0), ("one", 3.0), ("two", 3.0), ("two", 0.0), ("", 1.0)):
        made = ours.step(state, Controls("red ball", lora=name, lora_strength=strength)).latents_TCHW
        merged_in = merged(weights, adapters[name], strength) if name else weights
        other = Engine(*parts, of(engine.student, config, merged_in))
        if twin.text is not None:
            with torch.inference_mode():
                twin.text = other.student.text_kv(engine.text.embed("red ball"))
        wanted = other.step(twin, Controls("red ball")).latents_TCHW
        np.testing.assert_allclose(made, wanted, atol=2e-4, rtol=2e-4, err_msg=f"{name} at {strength}")


def test_with_regions_an_exchange_computes_all(thin: dict[str, Tensor], engine: Engine, tmp_path: Path) -> None:
    save_file(thin, tmp_path / "one.safetensors")
    adapters = read_adapters([tmp_path / "one.safetensors"], engine.config.student)
    ours = Engine(engine.config, engine.codec, engine.text, engine.student, adapters=adapters)
    state, settled = ours.open(7), []
    bare = Controls("red ball", regions=0.5)
    worn = replace(bare, lora="one", lora_strength=3.0)
    for controls in (bare, bare, worn, worn, replace(worn, lora_strength=1.0), bare, bare):
        chunk = ours.step(state, controls)
        assert state.regions is not None
        settled.append(state.regions.since)
        assert settled[-1] or chunk.active_HW is None
    assert settled == [0, 1, 0, 1, 0, 0, 1]


def test_levels_are_read_anew_once_low_rank_weights_are_worn_that_read_them(engine: Engine, tmp_path: Path) -> None:
    """The twin reads each level for every pass."""
    shapes = {name: value.shape for name, value in engine.student.model.state_dict().items()}
    path = tmp_path / "late.safetensors"
    save_file(peft_lora(["condition_embedder.time_embedder.linear_1"], shapes), path)
    parts = (engine.config, engine.codec, engine.text, engine.student)
    ours, twin = (Engine(*parts, adapters=read_adapters([path], engine.config.student)) for _ in range(2))
    twin._level = twin._level_of  # type: ignore[assignment]

    def stream(who: Engine, *worn: float) -> list[np.ndarray]:
        state = who.open(7)
        asked = [
            Controls("red ball", lora="late" if strength else "", lora_strength=strength or 1.0) for strength in worn
        ]
        return [who.step(state, controls).latents_TCHW for controls in asked]

    plain, made, wanted = stream(ours, 0, 0, 0, 0), stream(ours, 0, 2.0, 4.0, 0), stream(twin, 0, 2.0, 4.0, 0)
    assert all(map(np.array_equal, made, wanted))
    assert abs(made[1] - plain[1]).max() > 1e-3


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("diffusion_model.blocks.0.self_attn.q.lora_A.weight", torch.zeros(2, 24), "only one of its two halves"),
        ("diffusion_model.blocks.9.self_attn.q.lora_A.weight", torch.zeros(2, 24), "belongs to no layer"),
        ("lora_unet_blocks_0_mlp_layer1.lora_down.weight", torch.zeros(2, 24), "belongs to no layer"),
        ("diffusion_model.blocks.0.self_attn.q.diff_b", torch.zeros(24), "belongs to no layer"),
    ],
)
def test_weights_for_other_layers_are_refused(
    name: str, value: Tensor, told: str, config: ModelConfig, tmp_path: Path
) -> None:
    save_file({name: value}, tmp_path / "lora.safetensors")
    with pytest.raises(PipelineError) as refused:
        read_adapter(tmp_path / "lora.safetensors", config.student)
    assert refused.value.code == "lora_mismatch"
    assert told in refused.value.message


@pytest.mark.parametrize(
    ("down", "up"), [((2, 40), (24, 2)), ((2, 24), (40, 2)), ((2, 24), (24, 3)), ((24,), (24, 2)), ((), (24, 2))]
)
def test_weights_of_other_sizes_are_refused_with_the_sizes(
    down: tuple[int, ...], up: tuple[int, ...], config: ModelConfig, tmp_path: Path
) -> None:
    name = "transformer.blocks.0.attn1.to_q"
    save_file({f"{name}.lora_A.weight": torch.zeros(down), f"{name}.lora_B.weight": torch.zeros(up)}, tmp_path / "l.st")
    with pytest.raises(PipelineError) as refused:
        read_adapter(tmp_path / "l.st", config.student)
    assert refused.value.code == "lora_mismatch"
    assert "takes 24x24" in refused.value.message


@pytest.mark.parametrize(("value", "told"), [("much", "is a str"), (torch.ones(2), "an alpha of 2 numbers")])
def test_an_alpha_that_is_no_number_is_refused(
    value: object, told: str, thin: dict[str, Tensor], config: ModelConfig, tmp_path: Path
) -> None:
    name = next(iter(thin)).replace("lora_A.weight", "alpha")
    torch.save({**thin, name: value}, tmp_path / "lora.pt")
    with pytest.raises(PipelineError, match=told) as refused:
        read_adapter(tmp_path / "lora.pt", config.student)
    assert refused.value.code == "lora_mismatch"


def test_an_empty_file_and_one_without_the_entry_are_refused(config: ModelConfig, tmp_path: Path) -> None:
    torch.save({"critic_lora": {}}, tmp_path / "critic.pt")
    torch.save({"generator_lora": {}}, tmp_path / "empty.pt")
    for name in ("critic.pt", "empty.pt"):
        with pytest.raises(PipelineError) as refused:
            read_adapter(tmp_path / name, config.student, entry="generator_lora")
        assert refused.value.code == "lora_mismatch"
