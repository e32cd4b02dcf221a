"""A model folder written is a model folder read; every way to break one has its own answer."""

import copy
import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline import engine as engine_module
from pipeline.chunk import Controls
from pipeline.codec import PocketCodec
from pipeline.config import ModelConfig
from pipeline.engine import Engine
from pipeline.errors import PipelineError
from pipeline.student import Student
from pipeline.text import TextEncoder
from pipeline.weights import PARTS, export, load_parts, load_transformer, save_transformer, verify


@pytest.fixture
def folder(config: ModelConfig, codec: PocketCodec, text: TextEncoder, student: Student, tmp_path: Path) -> Path:
    export(tmp_path / "model", config, codec, text, student)
    return tmp_path / "model"


def refusal(folder: Path) -> PipelineError:
    with pytest.raises(PipelineError) as refused:
        Engine.load(folder)
    error = refused.value
    assert error.message
    assert error.remedy
    assert "\n" not in error.message
    return error


def test_a_folder_reads_back_with_the_same_weights_up_to_half_precision(
    folder: Path, config: ModelConfig, codec: PocketCodec, text: TextEncoder, student: Student
) -> None:
    read_config, *read = load_parts(folder)
    assert read_config == config
    for module, ours in zip(read, (codec, text, student), strict=True):
        assert not module.training
        assert not any(value.requires_grad for value in module.parameters())
        values, stored = module.state_dict(), ours.state_dict()
        assert values.keys() == stored.keys()
        for name, value in values.items():
            assert value.dtype == stored[name].dtype
            torch.testing.assert_close(value, stored[name], atol=1e-6, rtol=1e-3)


def test_a_model_that_was_read_makes_the_picture_of_the_one_that_was_written(folder: Path, engine: Engine) -> None:
    read = Engine.load(folder)
    red = Controls("red ball")
    ours, theirs = engine.step(engine.open(7), red), read.step(read.open(7), red)
    error = abs(ours.latents_TCHW - theirs.latents_TCHW)
    assert error.max() < 0.05 * ours.latents_TCHW.std()


@pytest.mark.parametrize("tiles", [False, True])
def test_the_codec_is_in_bfloat16_where_the_machine_has_tiles_for_it(
    folder: Path, tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "multiplies_bfloat16", lambda: tiles)
    codec = Engine.load(folder).codec
    assert isinstance(codec, PocketCodec)
    wanted = torch.bfloat16 if tiles else torch.float32
    assert {value.dtype for part in (codec.encoder, codec.decoder) for value in part.parameters()} == {wanted}
    assert codec.scale.dtype == torch.float32


def test_reading_and_writing_again_changes_nothing(folder: Path, tmp_path: Path) -> None:
    export(tmp_path / "again", *load_parts(folder))
    for name in ("config.json", "checksums.json", *(f"{part}.safetensors" for part in PARTS)):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_weights_are_stored_in_half_precision_and_statistics_in_single(folder: Path) -> None:
    for part, module in zip(PARTS, load_parts(folder)[1:], strict=True):
        weights = {name for name, _ in module.named_parameters()}
        for name, value in load_file(folder / f"{part}.safetensors").items():
            assert value.dtype == torch.float16 if name in weights else value.dtype in (torch.float32, torch.int64)


@pytest.mark.parametrize("name", ["codec.safetensors", "text.safetensors", "student.safetensors", "checksums.json"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    error = refusal(folder)
    assert error.code == "weights_missing"
    assert name in error.message


def test_a_folder_that_is_not_there_has_no_configuration(tmp_path: Path) -> None:
    assert refusal(tmp_path / "nowhere").code == "config_missing"


@pytest.mark.parametrize("part", PARTS)
def test_one_damaged_byte_is_found(folder: Path, part: str) -> None:
    path = folder / f"{part}.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    error = refusal(folder)
    assert error.code == "weights_damaged"
    assert path.name in error.message


def test_a_file_cut_short_is_damaged(folder: Path) -> None:
    path = folder / "student.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    assert refusal(folder).code == "weights_damaged"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b"{}"], ids=repr)
def test_a_broken_record_of_checksums_is_damage_too(folder: Path, content: bytes) -> None:
    (folder / "checksums.json").write_bytes(content)
    assert refusal(folder).code == "weights_damaged"


def test_weights_of_another_configuration_do_not_fit(folder: Path, config: ModelConfig) -> None:
    for other in (
        replace(config, student=replace(config.student, num_layers=3)),
        replace(config, student=replace(config.student, num_layers=1)),
        replace(config, student=replace(config.student, ffn_dim=64)),
        replace(config, text=replace(config.text, words=("ball",))),
        replace(config, codec=replace(config.codec, widths=(8, 12, 20))),
    ):
        (folder / "config.json").write_text(other.to_json())
        assert refusal(folder).code == "weights_mismatch"


def test_a_part_under_the_name_of_another_does_not_fit(folder: Path) -> None:
    (folder / "student.safetensors").write_bytes((folder / "text.safetensors").read_bytes())
    record = json.loads((folder / "checksums.json").read_text())
    record["student.safetensors"] = record["text.safetensors"]
    (folder / "checksums.json").write_text(json.dumps(record))
    verify(folder)
    assert refusal(folder).code == "weights_mismatch"


def test_a_configuration_with_an_unknown_key_is_refused(folder: Path) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "colour": "red"}))
    error = refusal(folder)
    assert error.code == "config_invalid"
    assert "colour" in error.message


def test_an_error_crosses_a_process_border_whole() -> None:
    error = PipelineError("weights_damaged", "It is broken.", "Restore it.")
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is PipelineError
    assert (back.code, back.message, back.remedy) == (error.code, error.message, error.remedy)
    assert str(back) == "It is broken."


@pytest.fixture
def transformer(student: Student, tmp_path: Path) -> Path:
    save_transformer(tmp_path / "transformer", student)
    return tmp_path / "transformer"


def transformer_refusal(folder: Path, config: ModelConfig) -> PipelineError:
    with pytest.raises(PipelineError) as refused:
        load_transformer(folder, config.student)
    assert "\n" not in refused.value.message
    return refused.value


def test_a_transformer_in_diffusers_layout_reads_back_bit_by_bit(
    transformer: Path, student: Student, config: ModelConfig
) -> None:
    assert json.loads((transformer / "config.json").read_text())["_class_name"] == "WanTransformer3DModel"
    read, ours = load_transformer(transformer, config.student).state_dict(), student.state_dict()
    assert read.keys() == ours.keys()
    assert all(torch.equal(read[name], value) for name, value in ours.items())


def test_a_transformer_in_several_files_and_half_precision_is_read_in_single(
    transformer: Path, student: Student, config: ModelConfig
) -> None:
    path = transformer / "diffusion_pytorch_model.safetensors"
    values = {name: value.half() for name, value in load_file(path).items()}
    path.unlink()
    names = sorted(values)
    for part, some in enumerate((names[:20], names[20:]), 1):
        save_file({name: values[name] for name in some}, transformer / f"{path.stem}-{part:05}-of-00002.safetensors")
    read = load_transformer(transformer, config.student).state_dict()
    assert {value.dtype for value in read.values()} == {torch.float32}
    torch.testing.assert_close(read, dict(student.state_dict()), atol=1e-6, rtol=1e-3)


def test_every_way_to_break_a_transformer_has_its_own_answer(transformer: Path, config: ModelConfig) -> None:
    path, weights = transformer / "config.json", transformer / "diffusion_pytorch_model.safetensors"
    told, values = json.loads(path.read_text()), load_file(weights)

    def telling(**changes: object) -> PipelineError:
        path.write_text(json.dumps(told | changes))
        return transformer_refusal(transformer, config)

    assert telling(_class_name="UNet").code == "weights_mismatch"
    assert "image_dim is 1280" in telling(image_dim=1280).message
    assert "ffn_dim is 96, the model's is 48" in telling(ffn_dim=96).message
    path.write_text("[]")
    assert transformer_refusal(transformer, config).code == "weights_mismatch"
    path.unlink()
    assert transformer_refusal(transformer, config).code == "weights_missing"
    path.write_text(json.dumps(told))
    missing = dict(values)
    missing.pop("proj_out.bias")
    save_file(missing, weights)
    assert "proj_out.bias" in transformer_refusal(transformer, config).message
    weights.write_bytes(b"half a file")
    assert transformer_refusal(transformer, config).code == "weights_damaged"
    weights.unlink()
    assert transformer_refusal(transformer, config).code == "weights_missing"


def test_a_variance_beyond_half_precision_survives_the_export(
    tmp_path: Path, config: ModelConfig, codec: PocketCodec, text: TextEncoder, student: Student
) -> None:
    wide = copy.deepcopy(codec)
    wide.normalise.running_var.fill_(70_761.0)
    export(tmp_path, config, wide, text, student)
    read = load_parts(tmp_path)[1]
    assert torch.equal(read.normalise.running_var, wide.normalise.running_var)


def test_weights_that_are_not_finite_are_never_written(
    tmp_path: Path, config: ModelConfig, codec: PocketCodec, text: TextEncoder, student: Student
) -> None:
    broken = copy.deepcopy(codec)
    broken.normalise.running_mean[0] = float("nan")
    with pytest.raises(AssertionError, match=r"normalise\.running_mean"):
        export(tmp_path, config, broken, text, student)
