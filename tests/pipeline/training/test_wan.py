"""A Wan run from encoded clips to an engine that streams: one process, every mechanism."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file

from pipeline.chunk import Controls
from pipeline.config import ModelConfig
from pipeline.engine import Engine
from pipeline.errors import PipelineError
from pipeline.student import Student
from pipeline.training.forcing import teacher_forced
from pipeline.training.lora import Adapted
from pipeline.training.parallel import Ranks, joined, shard
from pipeline.training.precomputed import Precomputed
from pipeline.training.recipe import scaled
from pipeline.training.settings import LoraSettings, WanSettings
from pipeline.training.wan import run_wan
from pipeline.training.wan_stages import Forced, teaching
from pipeline.weights import load_transformer
from tests.pipeline.training.ranks import Job, checkpoint, do
from tests.pipeline.training.test_loop import assert_same


@pytest.fixture(scope="module")
def out(wan_run: WanSettings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out") / "run"
    run_wan(folder, wan_run)
    return folder


@pytest.fixture
def alone() -> Iterator[Ranks]:
    with joined("cpu") as ranks:
        yield ranks


def started(settings: WanSettings) -> Student:
    assert settings.transformer is not None
    return load_transformer(settings.transformer, settings.model.student)


def test_the_exported_student_loads_into_the_engine_and_streams(out: Path, config: ModelConfig) -> None:
    engine = Engine.load(out / "export")
    assert engine.config == config
    state = engine.open(seed=7)
    chunks = [engine.step(state, Controls("red ball", seed=7)) for _ in range(3)]
    assert all(chunk.frames_THWC.shape == (8, 64, 96, 3) for chunk in chunks)
    assert abs(chunks[0].latents_TCHW - chunks[2].latents_TCHW).max() > 0.01


def test_the_engines_student_is_the_transformer_that_was_averaged(out: Path) -> None:
    averaged = checkpoint(out / "student")["ema"]
    exported = Engine.load(out / "export").student.state_dict()
    torch.testing.assert_close(exported, averaged, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("place", ["teacher", "student", "export"])
def test_every_stage_leaves_a_transformer_in_diffusers_layout(out: Path, place: str) -> None:
    folder = out / place / "transformer"
    model = WanTransformer3DModel.from_config(json.loads((folder / "config.json").read_text()))
    model.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"))


def test_without_parts_to_stand_beside_it_the_transformer_is_exported_alone(
    wan_run: WanSettings, tmp_path: Path
) -> None:
    do(Job(tmp_path, with_steps(replace(wan_run, beside=None), 1)))
    assert sorted(path.name for path in (tmp_path / "export").iterdir()) == ["training.json", "transformer"]


def with_steps(settings: WanSettings, steps: int) -> WanSettings:
    teacher, student = (replace(stage, steps=steps) for stage in (settings.teacher, settings.student))
    return replace(settings, teacher=teacher, student=student)


@pytest.mark.parametrize("stop_at", [("teacher", 2), ("student", 4)])
def test_a_stopped_run_goes_on_bit_by_bit(
    wan_run: WanSettings, out: Path, tmp_path: Path, stop_at: tuple[str, int]
) -> None:
    do(Job(tmp_path, wan_run, stop_at=stop_at))
    do(Job(tmp_path, wan_run))
    for stage in ("teacher", "student"):
        assert_same(checkpoint(tmp_path / stage), checkpoint(out / stage))
    for name in ("student.safetensors", "transformer/diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "export" / name).read_bytes() == (out / "export" / name).read_bytes()


def test_a_stage_can_be_the_last(wan_run: WanSettings, tmp_path: Path) -> None:
    do(Job(tmp_path, with_steps(wan_run, 1), stage="teacher"))
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


def test_the_teacher_learns_its_clips(wan_run: WanSettings, tmp_path: Path) -> None:
    losses = do(Job(tmp_path, with_steps(replace(wan_run, transformer=None), 24), stage="teacher"))["teacher"]
    assert sum(losses[-6:]) < 0.95 * sum(losses[:6])


def test_low_rank_training_keeps_nothing_but_the_thin_layers_and_exports_merged_weights(
    wan_run: WanSettings, tmp_path: Path
) -> None:
    settings = with_steps(replace(wan_run, lora=LoraSettings(rank=2, alpha=4)), 3)
    do(Job(tmp_path, settings))
    before = started(wan_run).model.state_dict()
    kept = checkpoint(tmp_path / "teacher")["module"]
    assert {name.rsplit(".", 2)[1] for name in kept} == {"down", "up"}
    after = load_file(tmp_path / "teacher" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert after.keys() == before.keys()
    for name, value in after.items():
        adapted = name.startswith("blocks.") and name.endswith(".weight") and value.ndim == 2
        assert torch.equal(value, before[name]) is not adapted, name
    averaged = checkpoint(tmp_path / "teacher")["ema"]
    change = averaged["model_blocks_0_attn1_to_q.up.weight"] @ averaged["model_blocks_0_attn1_to_q.down.weight"] * 2
    name = "blocks.0.attn1.to_q.weight"
    torch.testing.assert_close(after[name] - before[name], change, atol=1e-6, rtol=1e-4)
    student = Engine.load(tmp_path / "export").student
    assert not any(isinstance(layer, Adapted) for layer in student.modules())


def gradients(settings: WanSettings, ranks: Ranks, *, precision: str, checkpointing: bool) -> dict[str, torch.Tensor]:
    model = Forced(started(settings), settings.model)
    shard(model, model.student, ranks, precision=precision, checkpointing=checkpointing)
    data = Precomputed(settings.data, settings.model, seed=1)
    teaching(model, data, settings.teacher, ranks)(0)[0].backward()
    return {name: value.grad.full_tensor() for name, value in model.named_parameters()}  # type: ignore[union-attr]


def test_computing_layers_again_changes_no_gradient(wan_run: WanSettings, alone: Ranks) -> None:
    kept, again = (gradients(wan_run, alone, precision="fp32", checkpointing=how) for how in (False, True))
    assert all(value.abs().max() > 0 for value in kept.values())
    torch.testing.assert_close(again, kept, atol=0, rtol=0)


def test_passes_in_bfloat16_have_nearly_the_gradients_of_single_precision_which_is_theirs(
    wan_run: WanSettings, alone: Ranks
) -> None:
    single, half = (gradients(wan_run, alone, precision=kind, checkpointing=True) for kind in ("fp32", "bf16"))
    assert {value.dtype for value in half.values()} == {torch.float32}
    one, other = (torch.cat([value.flatten() for value in each.values()]) for each in (single, half))
    assert not torch.equal(one, other)
    assert torch.cosine_similarity(one, other, dim=0) > 0.99


def test_a_forced_pass_is_the_pocket_students(student: Student, config: ModelConfig) -> None:
    """Text that is read inside the layers equals text that was read before."""
    draw = torch.Generator().manual_seed(2)
    past, noisy = (torch.randn(2, 6, 4, *config.latent_size, generator=draw) for _ in range(2))
    sigmas, text = torch.rand(2, 3, generator=draw), torch.randn(2, 3, 6, 16, generator=draw)
    flow = teacher_forced(student, past, noisy, sigmas, student.text_kv(text.flatten(0, 1)), config)
    made = Forced(student, config)(past, noisy, sigmas, text)
    level = sigmas.repeat_interleave(2, 1)[:, :, None, None, None]
    torch.testing.assert_close(made, noisy - level * flow)


def test_a_budget_is_shared_by_both_stages(wan_run: WanSettings) -> None:
    shared = scaled(replace(wan_run, student=replace(wan_run.student, budget_s=3e9)), 100.0)
    assert (shared.teacher.budget_s, shared.student.budget_s) == (25, 75)


def refused(out: Path, settings: WanSettings, stage: str | None = None) -> PipelineError:
    with pytest.raises(PipelineError) as error:
        run_wan(out, settings, stage=stage)
    assert not out.exists()
    assert "\n" not in error.value.message
    return error.value


def test_what_does_not_fit_is_one_sentence_before_anything_is_made(
    wan_run: WanSettings, config: ModelConfig, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert refused(out, wan_run, "dessert").code == "stage_unknown"
    assert refused(out, replace(wan_run, data=tmp_path)).code == "data_empty"
    assert refused(out, replace(wan_run, transformer=tmp_path)).code == "weights_missing"
    deeper = replace(config, student=replace(config.student, num_layers=3))
    error = refused(out, replace(wan_run, model=deeper))
    assert (error.code, "num_layers is 2, the model's is 3" in error.message) == ("weights_mismatch", True)
    other_words = replace(config, text=replace(config.text, words=("cat",)))
    assert refused(out, replace(wan_run, model=other_words)).code == "export_mismatch"


def test_a_loss_that_is_not_a_number_stops_the_stage_and_keeps_the_last_good_checkpoint(
    wan_run: WanSettings, tmp_path: Path
) -> None:
    do(Job(tmp_path, wan_run, stop_at=("teacher", 2)))
    saved = checkpoint(tmp_path / "teacher")
    wild = replace(wan_run, teacher=replace(wan_run.teacher, learning_rate=1e30, warm_up_steps=1, steps=60, save_s=1e6))
    assert do(Job(tmp_path, wild)).keys() == {"loss_not_finite"}
    assert_same(checkpoint(tmp_path / "teacher"), saved)


def test_a_checkpoint_of_another_model_is_refused(wan_run: WanSettings, out: Path) -> None:
    lora = replace(wan_run, lora=LoraSettings(rank=2))
    assert do(Job(out, lora)).keys() == {"checkpoint_of_another_model"}
