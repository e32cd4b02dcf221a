"""Checkpoints in each family's own layout become the folder of the same model in diffusers' layout, or a sentence."""

import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.attention import CachedAttention
from pipeline.bases import BASES, WAN_LARGE, WAN_SMALL
from pipeline.config import ModelConfig, StudentConfig
from pipeline.convert import convert, verify
from pipeline.errors import PipelineError
from pipeline.family import Family
from pipeline.fit import blank, fit, recognise
from pipeline.kv_cache import KVCache
from pipeline.layout import RECORD, recorded
from pipeline.models import FAMILIES, family
from pipeline.sampler import denoise, draw_noise, levels
from pipeline.student import Student
from pipeline.weights import digest, load_transformer
from tests.limits import no_file_larger_than
from tests.pipeline.published import own_layout, peft_lora, publish

WAN = [row for row in FAMILIES if row.layout == "wan" and not row.coarse]
"""Those that have Wan's modules alone and come as one file; tests/pipeline/test_anyflow.py has the others."""


@pytest.fixture
def weights(student: Student) -> dict[str, Tensor]:
    return dict(student.model.state_dict())


@pytest.fixture
def shape(config: ModelConfig) -> StudentConfig:
    return config.student


def stock(model: torch.nn.Module, config: ModelConfig) -> Tensor:
    """What diffusers' own forward makes of some noise."""
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(1, config.student.in_channels, 2, *config.latent_size, generator=generator)
    text = torch.randn(1, 5, config.student.text_dim, generator=generator)
    with torch.inference_mode():
        return model(latents, torch.tensor([700]), text, return_dict=False)[0]


def refusal(make: Callable[[], object], code: str) -> PipelineError:
    with pytest.raises(PipelineError) as refused:
        make()
    assert refused.value.code == code, refused.value.message
    assert "\n" not in refused.value.message
    return refused.value


@pytest.mark.parametrize("row", WAN, ids=lambda row: row.name)
def test_a_familys_own_file_makes_the_pictures_of_its_twin_in_diffusers_layout(
    row: Family, weights: dict[str, Tensor], student: Student, config: ModelConfig, tmp_path: Path
) -> None:
    source = publish(row, weights, tmp_path)
    assert convert(source, tmp_path / "made", config.student, entry=row.weights)
    made = load_transformer(tmp_path / "made", config.student)
    assert all(torch.equal(value, weights[name]) for name, value in made.model.state_dict().items())
    assert torch.equal(stock(made.model, config), stock(student.model, config))
    verify(tmp_path / "made")


@pytest.mark.parametrize("row", WAN, ids=lambda row: row.name)
def test_a_converted_family_streams_by_its_rows_rules_without_an_end(
    row: Family, weights: dict[str, Tensor], config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BASES, row.base, replace(BASES[row.base], shape=config.student, channels=4))
    convert(publish(row, weights, tmp_path), tmp_path / "made", row.shape, entry=row.weights)
    student, ours = load_transformer(tmp_path / "made", row.shape), row.config(64, 48)
    cache, size = KVCache.of(ours), (1, ours.chunk, 4, *ours.latent_size)
    text = student.text_kv(torch.randn(1, 5, row.shape.text_dim, generator=torch.Generator().manual_seed(1)))
    # A family that draws over a video begins below pure noise, from the video.
    source = None if ours.sampler.steps[0] == 1000 else torch.zeros(size)
    seen = set()
    with torch.inference_mode():
        for chunk in range(12):
            attend = CachedAttention(cache, student, ours.grid, ours.chunk)

            def passes(noisy: Tensor, sigma: float, step: int, attend: CachedAttention = attend) -> Tensor:
                return student(noisy, torch.full((1, 1), 1000 * sigma), text, attend)

            noise = partial(draw_noise, size, 7, chunk)
            clean = denoise(passes, noise, levels(ours.sampler), source)
            attend.writing = True
            student(clean, torch.zeros(1, 1), text, attend)
            cache.commit(ours.chunk)
            assert torch.isfinite(clean).all()
            seen.add(cache.frames + ours.chunk)
    assert max(seen) == row.attends or row.chunk * 12 < row.attends
    assert cache.written == 12 * row.chunk


def test_diffusers_knows_the_shape_of_what_was_made(
    weights: dict[str, Tensor], student: Student, config: ModelConfig, tmp_path: Path
) -> None:
    convert(publish(family("krea-realtime"), weights, tmp_path), tmp_path / "made", config.student)
    theirs = WanTransformer3DModel.from_config(WanTransformer3DModel.load_config(tmp_path / "made"))
    theirs.load_state_dict(load_file(tmp_path / "made" / "diffusion_pytorch_model.safetensors"))
    assert torch.equal(stock(theirs, config), stock(student.model, config))


def test_longlive_is_its_base_with_its_low_rank_weights_merged_in(
    weights: dict[str, Tensor], student: Student, config: ModelConfig, tmp_path: Path
) -> None:
    row = family("longlive")
    layers = ["blocks.0.attn1.to_q", "blocks.1.attn2.to_out.0", "blocks.1.ffn.net.2"]
    thin = peft_lora(layers, {name: value.shape for name, value in weights.items()})
    torch.save({"generator_lora": thin, "critic_lora": {}}, tmp_path / "lora.pt")
    source = publish(row, weights, tmp_path)
    convert(
        source,
        tmp_path / "made",
        config.student,
        entry=row.weights,
        lora=tmp_path / "lora.pt",
        lora_entry=row.lora_weights,
    )
    made = load_transformer(tmp_path / "made", config.student).model.state_dict()
    halves = list(thin.values())
    for index, layer in enumerate(layers):
        name = f"{layer}.weight"
        torch.testing.assert_close(made[name], weights[name] + halves[2 * index + 1] @ halves[2 * index])
    assert torch.equal(made["blocks.0.attn1.to_k.weight"], weights["blocks.0.attn1.to_k.weight"])
    assert recorded(tmp_path / "made")["source"]["lora"]["sha256"] == digest(tmp_path / "lora.pt")


def test_a_file_is_converted_once_and_again_when_it_is_another(
    weights: dict[str, Tensor], shape: StudentConfig, tmp_path: Path
) -> None:
    row, made = family("self-forcing"), tmp_path / "made"
    source = publish(row, weights, tmp_path)
    assert convert(source, made, shape, entry=row.weights)
    assert not convert(source, made, shape, entry=row.weights)
    assert convert(source, made, shape, entry="generator")
    assert convert(source, made, shape, entry=row.weights, dtype=torch.bfloat16)
    assert {value.dtype for path in made.glob("*.safetensors") for value in load_file(path).values()} == {
        torch.bfloat16
    }
    assert recorded(made)["source"]["sha256"] == digest(source)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_one_changed_byte_and_one_lost_file_are_found(
    weights: dict[str, Tensor], shape: StudentConfig, tmp_path: Path
) -> None:
    made = tmp_path / "made"
    convert(publish(family("krea-realtime"), weights, tmp_path), made, shape)
    path = next(made.glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert path.name in refusal(lambda: verify(made), "weights_damaged").message
    path.unlink()
    assert path.name in refusal(lambda: verify(made), "weights_missing").message
    (made / RECORD).write_text("{")
    refusal(lambda: verify(made), "weights_missing")


def test_a_wrong_hash_is_told_with_both(weights: dict[str, Tensor], shape: StudentConfig, tmp_path: Path) -> None:
    source = publish(family("krea-realtime"), weights, tmp_path)
    error = refusal(lambda: convert(source, tmp_path / "made", shape, sha256="AB" * 32), "checkpoint_hash")
    assert digest(source)[:12] in error.message and "abababababab" in error.message
    assert not (tmp_path / "made").exists()
    assert convert(source, tmp_path / "made", shape, sha256=digest(source).upper())


def without_one(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in weights.items() if name != "proj_out.bias"}


def with_one_more(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return weights | {"gan.weight": torch.zeros(1)}


def with_one_of_another_shape(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return weights | {"blocks.1.attn2.to_k.weight": torch.zeros(3, 4)}


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (without_one, "1 is missing (proj_out.bias)."),
        (with_one_more, "1 is not known (gan.weight)."),
        (with_one_of_another_shape, "1 is of another shape (blocks.1.attn2.to_k.weight: 3x4, not 24x24)."),
    ],
)
@pytest.mark.parametrize("row", WAN, ids=lambda row: row.name)
def test_one_wrong_weight_in_a_familys_own_file_is_named(
    row: Family,
    spoil: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    told: str,
    weights: dict[str, Tensor],
    shape: StudentConfig,
    tmp_path: Path,
) -> None:
    source = publish(row, spoil(weights), tmp_path)
    refused = partial(convert, source, tmp_path / "made", shape, entry=row.weights)
    error = refusal(refused, "checkpoint_mismatch")
    assert error.message == f"{source} does not fit: {told}"
    assert error.remedy == "Name the family that it belongs to, or fetch the file of this one."
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("row", WAN, ids=lambda row: row.name)
def test_a_familys_file_on_the_other_base_is_told_by_that_bases_name(
    row: Family, shape: StudentConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = {"wan-1.3b": shape, "wan-14b": replace(shape, num_attention_heads=3, num_layers=3)}
    for name, small in shapes.items():
        monkeypatch.setitem(BASES, name, replace(BASES[name], shape=small))
    other = next(name for name in shapes if name != row.base)
    source = publish(row, dict(Student(shapes[other]).model.state_dict()), tmp_path)
    refused = partial(convert, source, tmp_path / "made", row.shape, entry=row.weights)
    error = refusal(refused, "checkpoint_mismatch")
    assert error.message.endswith(f" It looks like {BASES[other].title}.")
    # The larger has a layer that the smaller does not know, or that is missed; and all else has another size.
    assert ("missing (blocks.2." in error.message) is (row.base == "wan-14b")
    assert ("not known (blocks.2." in error.message) is (row.base == "wan-1.3b")
    assert "of another shape (" in error.message
    assert not (tmp_path / "made").exists()


def test_what_differs_is_told_in_one_sentence(weights: dict[str, Tensor], shape: StudentConfig, tmp_path: Path) -> None:
    own = own_layout(weights, "model.")
    del own["model.head.head.bias"]
    own["model.blocks.0.self_attn.q.weight"] = torch.zeros(3, 4)
    own["model.gan.weight"] = torch.zeros(1)
    save_file(own, tmp_path / "odd.safetensors")
    error = refusal(lambda: convert(tmp_path / "odd.safetensors", tmp_path / "made", shape), "checkpoint_mismatch")
    assert "1 is missing (proj_out.bias)" in error.message
    assert "1 is not known (gan.weight)" in error.message
    assert "(blocks.0.attn1.to_q.weight: 3x4, not 24x24)" in error.message
    assert not (tmp_path / "made").exists()


def test_a_checkpoint_of_another_family_is_named(weights: dict[str, Tensor], shape: StudentConfig) -> None:
    large = dict(blank(WAN_LARGE).model.state_dict())
    error = refusal(lambda: fit(large, WAN_SMALL, Path("large.pt")), "checkpoint_mismatch")
    assert "It looks like Wan 2.1 14B." in error.message
    assert len(error.message) < 500
    for sign, looks in (
        ("far_patch_embedding.weight", "AnyFlow-FAR"),
        ("vace_blocks.0.after_proj.bias", "Wan VACE"),
        ("condition_embedder.image_embedder.norm1.bias", "pictures as prompts"),
    ):
        odd = weights | {sign: torch.zeros(1)}
        assert looks in refusal(partial(fit, odd, shape, Path("odd.pt")), "checkpoint_mismatch").message


def test_what_a_file_looks_like_is_told_by_its_names(weights: dict[str, Tensor], shape: StudentConfig) -> None:
    one = torch.zeros(1)
    assert "LoRA" in (recognise({"blocks.0.self_attn.q.lora_A.weight": one}) or "")
    assert recognise({"decoder.conv_in.weight": one}) == "an autoencoder"
    assert recognise({"a": one}) is None
    assert recognise(weights) == f"a Wan of 2 layers, 24 wide, on {shape.in_channels} channels"


def test_a_disk_that_runs_full_leaves_nothing_and_what_was_there_before_stays(
    weights: dict[str, Tensor], shape: StudentConfig, tmp_path: Path
) -> None:
    source = publish(family("self-forcing"), weights, tmp_path)
    made, shelf = tmp_path / "shelf" / "made", tmp_path / "shelf"
    with no_file_larger_than(20_000):
        refusal(lambda: convert(source, made, shape), "disk_full")
    assert not shelf.exists(), "the folder around it was made for it"
    convert(source, made, shape)
    before = json.loads((made / RECORD).read_text())
    with no_file_larger_than(20_000):
        refusal(lambda: convert(source, made, shape, entry="generator"), "disk_full")
    assert list(shelf.iterdir()) == [made]
    assert recorded(made) == before
    verify(made)


def test_a_disk_that_is_too_small_is_told_with_the_numbers(
    weights: dict[str, Tensor], shape: StudentConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = publish(family("self-forcing"), weights, tmp_path)
    usage = namedtuple("usage", "total used free")(10**9, 10**9 - 100, 100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    error = refusal(lambda: convert(source, tmp_path / "shelf" / "made", shape), "disk_full")
    assert "are to be written, 0.0 GB are free" in error.message
    assert not (tmp_path / "shelf").exists()
    (tmp_path / "shelf").mkdir()
    refusal(lambda: convert(source, tmp_path / "shelf" / "new" / "made", shape), "disk_full")
    assert list((tmp_path / "shelf").iterdir()) == [], "what was there before stays, empty as it is"


def test_a_place_that_cannot_be_written_is_told(
    weights: dict[str, Tensor], shape: StudentConfig, tmp_path: Path
) -> None:
    source = publish(family("self-forcing"), weights, tmp_path)
    (tmp_path / "file").write_text("in the way")
    refusal(lambda: convert(source, tmp_path / "file" / "made", shape), "out_unwritable")
