"""Sizes follow from the configuration, and a broken file says so in plain words."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.config import CodecConfig, ModelConfig, StudentConfig, load_config
from pipeline.errors import PipelineError
from pipeline.student import Student


def test_a_written_configuration_reads_back_equal(config: ModelConfig, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for each in (config, replace(config, examples=("a red ball", "ein großer Ball"))):
        path.write_text(each.to_json())
        assert load_config(path) == each


def test_what_a_file_leaves_out_takes_its_default(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"name": "mine", "codec": {"frames": 2}}')
    assert load_config(path) == ModelConfig(name="mine", codec=CodecConfig(frames=2))


def test_sizes_follow_from_pixels_stride_and_patch(config: ModelConfig) -> None:
    assert config.frames_per_chunk == 8
    assert config.latent_size == (4, 6)
    assert config.grid == (2, 3)
    assert config.tokens_per_frame == 6


def test_the_shapes_of_wan_are_only_numbers() -> None:
    wan = ModelConfig(
        name="wan",
        width=832,
        height=480,
        chunk=3,
        student=StudentConfig(num_attention_heads=12, attention_head_dim=128, in_channels=16, out_channels=16),
        codec=CodecConfig(latent_channels=16, spatial_stride=8),
    )
    assert wan.grid == (30, 52)
    assert wan.tokens_per_frame == 1560


@pytest.mark.parametrize(
    ("heads", "ffn", "layers", "billions"), [(12, 8960, 30, 1.419), (40, 13824, 40, 14.288)], ids=["1.3B", "14B"]
)
def test_the_student_takes_the_shapes_of_wan(heads: int, ffn: int, layers: int, billions: float) -> None:
    config = StudentConfig(
        num_attention_heads=heads,
        attention_head_dim=128,
        in_channels=16,
        out_channels=16,
        text_dim=4096,
        ffn_dim=ffn,
        num_layers=layers,
    )
    with torch.device("meta"):
        student = Student(config)
    assert sum(value.numel() for value in student.parameters()) / 1e9 == pytest.approx(billions, abs=5e-4)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PipelineError) as refused:
        load_config(tmp_path / "config.json")
    assert refused.value.code == "config_missing"
    assert str(tmp_path) in refused.value.message


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not json",
        b'{"name": "cut',
        b"\xff\xfe\x00broken",
        b"[]",
        b"null",
        b'{"unknown": 1}',
        b'{"student": {"unknown": 1}}',
        b'{"student": 5}',
        b'{"cache": null}',
        b'{"cache": {"sink": 0, "window": 9, "rewrites": true}}',
    ],
    ids=repr,
)
def test_a_file_that_is_no_configuration_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(PipelineError) as refused:
        load_config(path)
    assert refused.value.code == "config_invalid"
    assert str(path) in refused.value.message
    assert refused.value.remedy
