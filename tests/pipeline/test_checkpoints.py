"""Names and wrappings of published checkpoints, and files that are none."""

import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import save_file

from pipeline.bases import WAN_LARGE, WAN_SMALL
from pipeline.checkpoints import own_name, read_checkpoint, unwrap, weight_name
from pipeline.config import StudentConfig
from pipeline.errors import PipelineError
from pipeline.fit import blank, fit
from tests.pipeline.published import own_layout

HERE = Path("some.pt")


@pytest.mark.parametrize("shape", [WAN_SMALL, WAN_LARGE], ids=["1.3B", "14B"])
def test_every_name_of_wans_own_code_becomes_the_one_that_diffusers_gives_it(shape: StudentConfig) -> None:
    ours = blank(shape).model.state_dict()
    own = own_layout({name: torch.zeros(()) for name in ours})
    assert len(own) == len(ours)
    theirs = list(convert_wan_transformer_to_diffusers(dict(own)))
    assert [weight_name(name) for name in own] == theirs
    assert set(theirs) == set(ours)


def published_sizes(layers: int, dim: int, hidden: int, wide: int = 4096) -> dict[str, tuple[int, ...]]:
    """Names and sizes of Wan 2.1's own text-to-video checkpoints, written out; nothing here is asked of our modules."""

    def linear(name: str, out: int, into: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}

    sizes = {"patch_embedding.weight": (dim, 16, 1, 2, 2), "patch_embedding.bias": (dim,)}
    sizes |= linear("text_embedding.0", dim, wide) | linear("text_embedding.2", dim, dim)
    sizes |= linear("time_embedding.0", dim, 256) | linear("time_embedding.2", dim, dim)
    sizes |= linear("time_projection.1", 6 * dim, dim)
    sizes |= linear("head.head", 64, dim) | {"head.modulation": (1, 2, dim)}
    for block in (f"blocks.{index}" for index in range(layers)):
        for attention in (f"{block}.self_attn", f"{block}.cross_attn"):
            for part in "qkvo":
                sizes |= linear(f"{attention}.{part}", dim, dim)
            sizes |= {f"{attention}.norm_q.weight": (dim,), f"{attention}.norm_k.weight": (dim,)}
        sizes |= {f"{block}.norm3.weight": (dim,), f"{block}.norm3.bias": (dim,), f"{block}.modulation": (1, 6, dim)}
        sizes |= linear(f"{block}.ffn.0", hidden, dim) | linear(f"{block}.ffn.2", dim, hidden)
    return sizes


@pytest.mark.parametrize(
    ("shape", "sizes", "numbers"),
    [
        (WAN_SMALL, published_sizes(30, 1536, 8960), 1_418_996_800),
        (WAN_LARGE, published_sizes(40, 5120, 13824), 14_288_491_584),
    ],
    ids=["1.3B", "14B"],
)
def test_the_published_lists_of_names_and_sizes_fit_the_real_shapes_to_the_last_one(
    shape: StudentConfig, sizes: dict[str, tuple[int, ...]], numbers: int
) -> None:
    held = {name: torch.empty(size, device="meta") for name, size in sizes.items()}
    assert len(held) == 27 * shape.num_layers + 15
    assert sum(value.numel() for value in held.values()) == numbers
    assert len(fit(unwrap(held, None, HERE), shape, HERE)) == len(held)


@pytest.mark.parametrize(
    "name",
    [
        "model.{}",
        "generator.model.{}",
        "module.model.{}",
        "model._fsdp_wrapped_module.{}",
        "_fsdp_wrapped_module._orig_mod.model.{}",
        "model.diffusion_model.{}",
        "diffusion_model.{}",
        "transformer.{}",
        "base_model.model.{}",
        "_orig_mod.{}",
    ],
)
def test_what_wrappers_add_to_a_name_is_taken_away(name: str) -> None:
    for own, ours in (
        ("blocks.7.self_attn.o.weight", "blocks.7.attn1.to_out.0.weight"),
        ("blocks._fsdp_wrapped_module.7._checkpoint_wrapped_module.modulation", "blocks.7.scale_shift_table"),
        ("head.modulation", "scale_shift_table"),
        ("blocks.0.attn2.norm_k.weight", "blocks.0.attn2.norm_k.weight"),
        ("patch_embedding.bias", "patch_embedding.bias"),
    ):
        assert weight_name(name.format(own)) == ours


def test_names_in_diffusers_layout_stay_and_the_way_back_is_the_way_there() -> None:
    for name in blank(StudentConfig()).model.state_dict():
        assert weight_name(name) == name
    assert own_name("blocks.3.attn2.to_out.0") == "blocks.3.cross_attn.o"
    assert own_name("proj_out") == "head.head"


def test_the_best_entry_is_taken_unless_one_is_named() -> None:
    held = {"generator": {"a": torch.tensor(1)}, "generator_ema": {"a": torch.tensor(2)}, "step": 7}
    assert unwrap(held, None, HERE)["a"] == 2
    assert unwrap(held, "generator", HERE)["a"] == 1


def test_a_file_of_bare_weights_needs_no_entry() -> None:
    assert list(unwrap({"model.proj_out.bias": torch.zeros(1)}, "generator_ema", HERE)) == ["proj_out.bias"]


@pytest.mark.parametrize(
    ("held", "entry", "told"),
    [
        ({"critic": {"a": torch.zeros(1)}, "step": 3}, "generator", "it has no entry 'generator'; it has critic, step"),
        ({}, None, "it has nothing"),
        ({"generator": {"a": torch.zeros(1), "lr": 0.1}}, None, "lr is a float, not a tensor"),
        ({"model.a": torch.zeros(1), "generator.a": torch.zeros(1)}, None, "two of its weights are both a"),
        ({"generator": 5}, None, "it has no entry"),
    ],
)
def test_a_checkpoint_wrapped_in_another_way_is_refused(held: dict[str, object], entry: str | None, told: str) -> None:
    with pytest.raises(PipelineError) as refused:
        unwrap(held, entry, HERE)
    assert refused.value.code == "checkpoint_mismatch"
    assert told in refused.value.message


def refusal(path: Path) -> PipelineError:
    with pytest.raises(PipelineError) as refused:
        read_checkpoint(path)
    assert str(path) in refused.value.message
    assert "\n" not in refused.value.message
    assert refused.value.remedy
    return refused.value


class Code:
    """A pickle of this runs a command where it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch ran",)


def test_a_pickle_with_code_in_it_is_refused_and_the_code_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"generator": {"a": torch.zeros(1)}, "extra": Code()}, tmp_path / "new.pt")
    torch.save({"extra": Code()}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps({"extra": Code()}))
    torch.save({"settings": SimpleNamespace(steps=4)}, tmp_path / "settings.pt")
    for name, asked in (("new.pt", "system"), ("old.pt", "system"), ("plain.pkl", ""), ("settings.pt", "Namespace")):
        error = refusal(tmp_path / name)
        assert error.code == "checkpoint_unsafe"
        assert asked in error.message
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["pt", "old", "safetensors"])
@pytest.mark.parametrize("left", [0, 3, 60, 0.5, 0.99])
def test_a_file_cut_short_is_damaged(tmp_path: Path, kind: str, left: float) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    weights = {"a": torch.arange(3000.0), "b": torch.arange(500.0)}
    if kind == "safetensors":
        save_file(weights, whole)
    else:
        torch.save({"generator": weights}, whole, _use_new_zipfile_serialization=kind == "pt")
    assert read_checkpoint(whole)
    content = whole.read_bytes()
    cut.write_bytes(content[: int(left * len(content)) if left < 1 else int(left)])
    assert refusal(cut).code == "checkpoint_damaged"


def test_what_is_no_checkpoint_at_all_is_damaged_or_missing(tmp_path: Path) -> None:
    (tmp_path / "page.pt").write_text("<html>404</html>")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    assert refusal(tmp_path / "page.pt").code == "checkpoint_damaged"
    assert "list" in refusal(tmp_path / "list.pt").message
    assert refusal(tmp_path / "nowhere.pt").code == "checkpoint_missing"
    assert refusal(tmp_path).code == "checkpoint_missing"
