"""The probe's clips repeat by number, and a few steps teach it to read a handful of them."""

import colorsys
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config import ModelConfig
from pipeline.training import world
from pipeline.training.autoencoder import item_rng
from pipeline.training.probe import (
    FEATURES,
    Probe,
    bounds,
    load_probe,
    probe_loss,
    save_probe,
    told_of,
    train_probe,
)
from pipeline.training.probe_clips import ATTRIBUTES, FRAMES, HEIGHT, WIDTH, ProbeClips, spoil, view, view_times_s
from pipeline.training.settings import StageSettings

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

SEED, COUNT = 41, 6


@pytest.fixture(scope="module")
def probe(config: ModelConfig) -> Probe:
    """Overfitted to six clips."""
    torch.manual_seed(0)
    made = Probe().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    dataset = ProbeClips(config, SEED, spoilt=False)
    clips, words, centres = (torch.stack(parts) for parts in zip(*map(dataset.__getitem__, range(COUNT)), strict=True))
    optimizer = torch.optim.AdamW(made.parameters(), 3e-3)
    for _ in range(45):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            reading = made(clips)
        optimizer.zero_grad()
        probe_loss(reading, words, centres)[0].backward()
        optimizer.step()
    return made.eval().requires_grad_(False)


def test_an_item_is_a_pure_function_of_its_number_and_knows_its_scene(config: ModelConfig) -> None:
    clips, again = ProbeClips(config, SEED), ProbeClips(config, SEED)
    for index in (0, 5, 2**39):
        clip, words, centres = clips[index]
        assert clip.dtype == torch.uint8
        assert clip.shape == (FRAMES, 3, HEIGHT, WIDTH)
        assert all(torch.equal(one, other) for one, other in zip((clip, words, centres), again[index], strict=True))
        scene, times_s = clips.scene(index)
        assert scene.second is None
        assert [names[k] for names, k in zip(ATTRIBUTES.values(), words.tolist(), strict=True)] == [
            getattr(scene, name) for name in ATTRIBUTES
        ]
        track = world.track(scene, times_s, config.width, config.height) / (config.width, config.height)
        assert np.allclose(centres.numpy(), track, atol=1e-6)
    assert not torch.equal(clips[0][0], ProbeClips(config, SEED + 1)[0][0])


def test_every_second_clip_is_an_opening_of_the_scene_that_the_next_one_shows_later(config: ModelConfig) -> None:
    clips = ProbeClips(config, SEED)
    for index in range(0, 40, 2):
        (scene, opening_s), (same, later_s) = clips.scene(index), clips.scene(index + 1)
        assert scene == same
        assert np.allclose(opening_s, np.arange(8) / 4)
        assert 0 < later_s[0] < 60


def test_a_clip_of_two_seconds_is_seen_as_its_own_pictures(config: ModelConfig) -> None:
    scene, times_s = ProbeClips(config, SEED).scene(1)
    whole = world.render(scene, times_s[0] + np.arange(32) / config.fps, config.width, config.height)
    assert np.allclose(view_times_s(config, times_s[0]), times_s)
    assert torch.equal(view(whole), ProbeClips(config, SEED, spoilt=False)[1][0])
    with pytest.raises(AssertionError, match="31 pictures"):
        view(whole[1:])


def test_spoiling_changes_the_picture_and_keeps_the_hue() -> None:
    patch = np.empty((2, 24, 24, 3), np.uint8)
    for rgb in ((230, 30, 38), (255, 132, 14), (36, 92, 246), (146, 52, 220)):
        patch[:] = rgb
        for number in range(8):
            spoilt = spoil(patch, item_rng(SEED, number))
            assert (spoilt != patch).any()
            was, now = (colorsys.rgb_to_hsv(*(p.mean(axis=(0, 1, 2)) / 255))[0] for p in (patch, spoilt))
            assert abs((now - was + 0.5) % 1 - 0.5) < 0.03


def test_a_few_steps_on_a_handful_of_clips_teach_words_and_centres(probe: Probe, config: ModelConfig) -> None:
    found = bounds(probe, config, count=COUNT, seed=SEED)
    assert found.ceiling.keys() == set(ATTRIBUTES)
    assert min(found.ceiling.values()) >= 0.8
    assert np.mean(list(found.floor.values())) < 0.6
    assert found.centre_px < 0.02 * config.width
    assert found.motion.median_error < 0.25


def test_a_mover_at_the_edge_has_its_centre_at_the_edge(probe: Probe, config: ModelConfig) -> None:
    dataset = ProbeClips(config, SEED, spoilt=False)
    clips, _, centres = (torch.stack(parts) for parts in zip(*map(dataset.__getitem__, range(COUNT)), strict=True))
    near = (centres[..., 0] - centres[..., 0].round()).abs() < 0.08
    assert near.any(), "no clip of this seed goes round the edge"
    off = probe.read(clips).centres_BT2[near.numpy()][:, 0] - centres[near][:, 0].numpy()
    assert np.abs(off - np.rint(off)).max() < 0.05


def test_motion_is_read_from_the_path_and_looks_are_not(probe: Probe, config: ModelConfig) -> None:
    dataset = ProbeClips(config, SEED, spoilt=False)
    moving = next(k for k in range(COUNT) if dataset.scene(k)[0].motion in ("moves left", "moves right"))
    clip = dataset[moving][0][None]
    forward, backward = probe(clip), probe(clip.flip(1))
    for name in ("subject", "colour", "place", "style"):
        torch.testing.assert_close(forward.logits[name], backward.logits[name], atol=1e-3, rtol=1e-3)
    assert not torch.allclose(forward.logits["motion"], backward.logits["motion"], atol=0.1)


def test_a_stored_probe_reads_the_same(probe: Probe, config: ModelConfig, tmp_path: Path) -> None:
    clips = torch.stack([ProbeClips(config, SEED, spoilt=False)[index][0] for index in range(3)])
    save_probe(probe, tmp_path / "probe.safetensors", "overfitted")
    assert told_of(tmp_path / "probe.safetensors") == "overfitted"
    answers, again = probe.read(clips), load_probe(tmp_path / "probe.safetensors").read(clips, batch=2)
    assert answers.features.shape == (3, FEATURES)
    assert answers.words == again.words
    assert np.abs(answers.centres_BT2 - again.centres_BT2).max() < 2e-3


@pytest.mark.usefixtures("one_second_steps")
def test_training_repeats_and_a_finished_one_is_only_read(config: ModelConfig, tmp_path: Path) -> None:
    settings = StageSettings(budget_s=100.0, steps=2)
    first, second = (train_probe(config, tmp_path / name, settings, batch=2) for name in ("one", "two"))
    saved = (tmp_path / "one" / "checkpoint.pt").read_bytes()
    third = train_probe(config, tmp_path / "one", settings, batch=2)
    assert (tmp_path / "one" / "checkpoint.pt").read_bytes() == saved
    assert not first.training
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
        assert torch.equal(value, third.state_dict()[name])
