"""Encoded clips: batches depend on seed and number alone, shares make the whole, and what does not fit is named."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.config import ModelConfig
from pipeline.errors import PipelineError
from pipeline.training.precomputed import UNPROMPTED, Batch, Precomputed, write_clip


@pytest.fixture
def data(precomputed: Path, config: ModelConfig) -> Precomputed:
    return Precomputed(precomputed, config, seed=7)


def drawn(batch: Batch) -> torch.Tensor:
    return batch.drawn(lambda clip, generator: torch.randn(clip.shape, generator=generator))


@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
def test_the_shares_of_all_processes_are_the_batch_of_one_noise_and_all(data: Precomputed, ranks: int) -> None:
    whole = data.batch(5, 6)
    shares = [data.batch(5, 6, rank=rank, ranks=ranks) for rank in range(ranks)]
    assert torch.equal(torch.cat([share.latents_BTCHW for share in shares]), whole.latents_BTCHW)
    assert torch.equal(torch.cat([share.text_BKLD for share in shares]), whole.text_BKLD)
    assert torch.equal(torch.cat([drawn(share) for share in shares]), drawn(whole))


def test_a_batch_is_a_function_of_seed_and_number(precomputed: Path, config: ModelConfig, data: Precomputed) -> None:
    again, other = Precomputed(precomputed, config, seed=7), Precomputed(precomputed, config, seed=8)
    data.batch(1, 4)
    assert torch.equal(data.batch(2, 4).latents_BTCHW, again.batch(2, 4).latents_BTCHW)
    assert torch.equal(drawn(data.batch(2, 4)), drawn(again.batch(2, 4)))
    assert not torch.equal(drawn(data.batch(2, 4)), drawn(data.batch(3, 4)))
    assert not torch.equal(drawn(data.batch(2, 4)), drawn(other.batch(2, 4)))


def test_the_same_clip_twice_in_a_batch_meets_different_noise(data: Precomputed) -> None:
    noise = drawn(data.batch(0, 12))
    assert len({float(row.sum()) for row in noise}) == 12


def test_every_kind_of_float_is_read_in_single_precision_with_a_prompt_per_chunk(
    data: Precomputed, config: ModelConfig
) -> None:
    batch = data.batch(0, 12)
    assert batch.latents_BTCHW.dtype == batch.text_BKLD.dtype == torch.float32
    assert batch.latents_BTCHW.shape == (12, 6, 4, *config.latent_size)
    assert batch.text_BKLD.shape == (12, 3, config.text.length, config.student.text_dim)
    assert not batch.text_BKLD[:, :, 5:].any()


LATENTS, TEXT = torch.zeros(6, 4, 4, 6), torch.zeros(1, 3, 16)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            lambda path: write_clip(path, torch.zeros(6, 4, 4, 5), TEXT),
            "its latents are (6, 4, 4, 5), not (6, 4, 4, 6)",
        ),
        (lambda path: write_clip(path, torch.zeros(4, 4, 4, 6), TEXT), "its latents are (4, 4, 4, 6)"),
        (lambda path: write_clip(path, LATENTS, torch.zeros(2, 3, 16)), "its text is (2, 3, 16), not (1 or 3, up to 6"),
        (lambda path: write_clip(path, LATENTS, torch.zeros(1, 9, 16)), "its text is (1, 9, 16)"),
        (lambda path: write_clip(path, LATENTS, torch.zeros(1, 3, 8)), "its text is (1, 3, 8)"),
        (lambda path: write_clip(path, LATENTS.long(), TEXT), "its latents is I64, not a float"),
        (lambda path: save_file({"latents": LATENTS}, path), "it holds latents, not latents, text"),
        (lambda path: path.write_bytes(b"half a"), "it cannot be read"),
        (lambda path: (path.parent / UNPROMPTED).unlink(), "unprompted.safetensors is not there"),
    ],
)
def test_a_clip_that_does_not_fit_is_named_before_training(
    precomputed: Path, config: ModelConfig, tmp_path: Path, damage: Callable[[Path], object], said: str
) -> None:
    folder = shutil.copytree(precomputed, tmp_path / "data")
    damage(folder / "00004.safetensors")
    with pytest.raises(PipelineError) as refused:
        Precomputed(folder, config, seed=0)
    assert refused.value.code == "data_invalid"
    assert said in refused.value.message
    assert "\n" not in refused.value.message


def test_clips_that_do_not_fill_chunks_are_refused(precomputed: Path, config: ModelConfig) -> None:
    with pytest.raises(PipelineError) as refused:
        Precomputed(precomputed, replace(config, chunk=4), seed=0)
    assert refused.value.code == "data_invalid"
    assert "6 latent frames do not fill chunks of 4" in refused.value.message


def test_a_value_that_is_no_number_is_refused_when_it_is_met(
    config: ModelConfig, precomputed: Path, tmp_path: Path
) -> None:
    write_clip(tmp_path / "a.safetensors", LATENTS / 0, TEXT)
    shutil.copy(precomputed / UNPROMPTED, tmp_path)
    with pytest.raises(PipelineError) as refused:
        Precomputed(tmp_path, config, seed=0).batch(0, 1)
    assert refused.value.code == "data_invalid"
    assert "not finite" in refused.value.message


@pytest.mark.parametrize("folder", ["empty", "nowhere"])
def test_a_folder_without_clips_says_so(config: ModelConfig, tmp_path: Path, folder: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(PipelineError) as refused:
        Precomputed(tmp_path / folder, config, seed=0)
    assert refused.value.code == "data_empty"
