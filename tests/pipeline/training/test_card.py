"""The card says what was recorded, and nothing of what was not run."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from pipeline.config import ModelConfig
from pipeline.training.card import Record, card, record
from pipeline.training.settings import AutoencoderSettings, ClipSettings, TrainSettings


def test_the_card_names_stages_with_their_steps_time_and_settings(config: ModelConfig) -> None:
    records = {"autoencoder": Record(3100, 1200.4), "teacher": Record(5200, 3900.0)}
    text = card(config, TrainSettings(), {"student": nn.Linear(1000, 1000)}, records, "cpu")
    assert "| `student.safetensors` | 1.0 M |" in text
    assert "| autoencoder |" in text and "| 3,100 | 1,200 s | learning_rate 0.0006, ema 0.998, " in text
    assert "| teacher |" in text and "muon True" in text
    assert "| matching |" not in text
    assert "1000, 750, 500, 250" in text
    assert "the procedural world" in text


def test_the_card_of_a_model_of_your_own_names_your_clips(config: ModelConfig) -> None:
    settings = replace(TrainSettings(), clips=ClipSettings(folder="/home/me/cats"))
    text = card(config, settings, {}, {}, "cpu")
    assert "the clips in `cats`" in text
    assert "/home/me" not in text


def test_the_card_of_a_run_with_a_start_says_what_it_began_with(config: ModelConfig) -> None:
    kept = AutoencoderSettings(keep=True)
    text = card(config, replace(TrainSettings(), start="pocket", autoencoder=kept), {}, {}, "cpu")
    assert "began with the weights of the embedded model; its codec stayed as it was." in text
    text = card(config, replace(TrainSettings(), start="/home/me/cats"), {}, {}, "cpu")
    assert "began with the weights of `cats`." in text
    assert "began" not in card(config, TrainSettings(), {}, {}, "cpu")


def test_a_record_is_what_the_checkpoint_says(tmp_path: Path) -> None:
    assert record(tmp_path) is None
    torch.save({"step": 7, "trained_s": 1.5, "module": {"w": torch.zeros(3)}}, tmp_path / "checkpoint.pt")
    assert record(tmp_path) == Record(7, 1.5)
