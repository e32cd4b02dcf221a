"""Clips are planned by number, encoding goes on where it stopped, and batches repeat with their step."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.codec import PocketCodec, pixels_to_frames
from pipeline.config import ModelConfig
from pipeline.structure import CHANNELS
from pipeline.training.autoencoder import item_rng
from pipeline.training.captions import WORDS, split
from pipeline.training.clips import CHUNKS, Clips, Plans, clip_plan, encode_clips, foreseeable, scene_from

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


class KilledError(Exception):
    """Stands for the end of the process."""


class StoppingCodec:
    """The codec that is asked a number of times and then no more."""

    def __init__(self, codec: PocketCodec, times: int) -> None:
        self.codec, self.times = codec, times

    def encode(self, frames_BTCHW: Tensor) -> Tensor:
        if self.times == 0:
            raise KilledError
        self.times -= 1
        return self.codec.encode(frames_BTCHW)


def test_a_plan_is_a_pure_function_of_its_number(config: ModelConfig) -> None:
    for number in range(20):
        assert clip_plan(config, item_rng(11, number)) == clip_plan(config, item_rng(11, number))
    assert clip_plan(config, item_rng(11, 0))[0] != clip_plan(config, item_rng(12, 0))[0]


def test_a_plan_opens_the_scene_and_jumps_at_most_once_after_the_first_chunk(config: ModelConfig) -> None:
    chunk_s = config.frames_per_chunk / config.fps
    jumps = 0
    for number in range(200):
        scenes, starts_s = clip_plan(config, item_rng(11, number))
        assert len(scenes) == len(starts_s) == CHUNKS
        assert starts_s[0] == 0
        anew = [k for k in range(1, CHUNKS) if scenes[k].motion != scenes[k - 1].motion]
        off = [k for k in range(1, CHUNKS) if not np.isclose(starts_s[k] - starts_s[k - 1], chunk_s)]
        assert set(off) <= {1, *anew}
        assert all(starts_s[k] == 0 for k in anew)
        jumps += starts_s[1] > chunk_s + 1e-6
    assert 60 < jumps < 130


def test_a_plan_of_one_chunk_is_an_opening(config: ModelConfig) -> None:
    for number in range(50):
        scenes, starts_s = clip_plan(config, item_rng(11, number), chunks=1)
        assert len(scenes) == 1
        assert starts_s == [0]


def test_only_the_chunk_that_time_jumped_to_cannot_be_foreseen() -> None:
    assert foreseeable([0, 0.5, 1, 1.5], 0.5) == [True] * 4
    assert foreseeable([0, 7.5, 8, 8.5], 0.5) == [True, False, True, True]
    assert foreseeable([0, 7.5, 0, 0.5], 0.5) == [True, False, True, True]  # a new motion begins anew in the middle
    assert foreseeable([0, 0, 0.5, 1], 0.5) == [True] * 4


def test_a_change_of_scene_happens_once_and_keeps_the_layout(config: ModelConfig) -> None:
    changed = set()
    switches = 0
    for number in range(300):
        scenes, _ = clip_plan(config, item_rng(11, number))
        borders = [place for place in range(1, CHUNKS) if scenes[place] != scenes[place - 1]]
        assert len(borders) <= 1
        assert len({scene.layout_seed for scene in scenes}) == 1
        assert len({scene.second for scene in scenes}) == 1
        switches += len(borders)
        first, last = scenes[0], scenes[-1]
        if first.speed != last.speed:
            assert first.motion != last.motion
        changed |= {
            name
            for name in ("subject", "colour", "motion", "speed", "place", "style")
            if getattr(first, name) != getattr(last, name)
        }
    assert 90 < switches < 150
    assert changed == {"subject", "colour", "motion", "speed", "place", "style"}


def test_the_pictures_of_a_plan_show_its_scenes(config: ModelConfig) -> None:
    plans = Plans(config, seed=11, count=3)
    pictures, text = plans[2]
    assert pictures.shape == (CHUNKS * config.frames_per_chunk, config.height, config.width, 3)
    assert pictures.dtype == torch.uint8
    plan = json.loads(text)
    scenes, starts_s = clip_plan(config, item_rng(11, 2))
    assert [scene_from(item) for item in plan["scenes"]] == scenes
    assert plan["starts_s"] == starts_s
    assert torch.equal(pictures, plans[2][0])


def test_clips_on_disk_are_the_codecs_latents(encoded: Path, config: ModelConfig, codec: PocketCodec) -> None:
    clips = Clips(encoded, config, seed=1)
    assert clips.latents.shape == (10, CHUNKS * config.chunk, config.codec.latent_channels, *config.latent_size)
    pictures, _ = Plans(config, 11, 10)[7]
    made = codec.encode(pixels_to_frames(pictures)[None])[0].numpy()
    stored = clips.latents[7].astype(np.float32)
    assert np.abs(stored - made).mean() < 0.05 * made.std()  # bfloat16 on the way, float16 at rest


@pytest.mark.parametrize("times", [0, 1, 2])
def test_encoding_goes_on_where_it_was_stopped_with_the_same_bytes(
    encoded: Path, config: ModelConfig, codec: PocketCodec, tmp_path: Path, times: int
) -> None:
    with pytest.raises(KilledError):
        encode_clips(config, StoppingCodec(codec, times), tmp_path, count=10, seed=11)  # type: ignore[arg-type]
    kept = (tmp_path / "plans.jsonl").read_text().splitlines()
    assert len(kept) == 4 * times
    rest = StoppingCodec(codec, 3 - times)
    encode_clips(config, rest, tmp_path, count=10, seed=11)  # type: ignore[arg-type]
    assert rest.times == 0
    for name in ("latents.npy", "structure.npy", "plans.jsonl"):
        assert (tmp_path / name).read_bytes() == (encoded / name).read_bytes()


def test_a_finished_folder_is_left_as_it_is(encoded: Path, config: ModelConfig, codec: PocketCodec) -> None:
    before = (encoded / "latents.npy").read_bytes()
    encode_clips(config, StoppingCodec(codec, 0), encoded, count=10, seed=11)  # type: ignore[arg-type]
    assert (encoded / "latents.npy").read_bytes() == before


def test_a_batch_repeats_with_its_step_and_has_a_caption_a_chunk(encoded: Path, config: ModelConfig) -> None:
    latents, prompts, known, control, movers = Clips(encoded, config, seed=1).batch(5, 6)
    again, prompts_again, _, control_again, movers_again = Clips(encoded, config, seed=1).batch(5, 6)
    assert torch.equal(latents, again)
    assert torch.equal(control, control_again)
    assert torch.equal(movers, movers_again)
    assert movers.shape == (*latents.shape[:2], *latents.shape[3:])
    assert control.shape == (*latents.shape[:2], CHANNELS, *latents.shape[3:])
    assert prompts == prompts_again
    assert latents.shape == (6, CHUNKS * config.chunk, config.codec.latent_channels, *config.latent_size)
    assert latents.dtype == torch.float32
    assert len(prompts) == 6 * CHUNKS
    assert known.shape == (6, CHUNKS)
    assert set(known.unique().tolist()) <= {0.0, 1.0}
    assert all(set(split(prompt)) <= set(WORDS) for prompt in prompts)


def test_free_scenes_come_with_their_structure_and_the_others_with_none(encoded: Path, config: ModelConfig) -> None:
    clips = Clips(encoded, config, seed=1)
    assert 0 < clips.free.sum() < len(clips.free)
    for step in range(4):
        latents, _, _, control, _ = clips.batch(step, 8)
        for clip, edges in zip(latents, control, strict=True):
            index = int(np.flatnonzero((clips.latents == clip.numpy().astype(np.float16)).all((1, 2, 3, 4)))[0])
            assert clips.structure[index].any()
            told = clips.structure[index] if clips.free[index] else np.zeros_like(clips.structure[index])
            assert np.array_equal(edges.mul(255).round().numpy(), told)


def test_other_steps_and_seeds_give_other_batches(encoded: Path, config: ModelConfig) -> None:
    said = [tuple(Clips(encoded, config, seed).batch(step, 6)[1]) for seed in (1, 2) for step in (0, 1, 10**6)]
    assert len(set(said)) == len(said)


def test_each_chunk_is_captioned_by_its_own_scene_and_a_lasting_scene_keeps_its_caption(
    encoded: Path, config: ModelConfig
) -> None:
    clips = Clips(encoded, config, seed=1)
    for step in range(5):
        latents, prompts, *_ = clips.batch(step, 8)
        for clip, chunks in zip(latents, np.array(prompts).reshape(8, CHUNKS).tolist(), strict=True):
            matches = np.flatnonzero((clips.latents == clip.numpy().astype(np.float16)).all((1, 2, 3, 4)))
            scenes = clips.scenes[int(matches[0])]
            for place, (scene, prompt) in enumerate(zip(scenes, chunks, strict=True)):
                assert f"{scene.colour} {scene.subject}" in prompt
                if place and scenes[place - 1] == scene:
                    assert prompt == chunks[place - 1]
