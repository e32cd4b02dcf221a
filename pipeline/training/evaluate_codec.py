"""What the codec reaches alone, and how quiet a model keeps its background against it. Knows no probe, no prompts."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.codec import CodecMemory, PocketCodec, frames_to_pixels, pixels_to_frames
from pipeline.config import ModelConfig
from pipeline.training import world
from pipeline.training.asks import Ask
from pipeline.training.autoencoder import item_rng
from pipeline.training.generic import generic_clip
from pipeline.training.measures import Noise, background, background_noise, psnr_db

RENDERS_SEED, GENERIC_SEED = 54, 55
_CHUNKS = 2
Pictures = NDArray[np.uint8]


def render_clips(config: ModelConfig, count: int) -> list[Pictures]:
    """Scenes of the world at random times, two movers in some."""
    clips = []
    for number in range(count):
        rng = item_rng(RENDERS_SEED, number)
        scene, start_s = world.sample_scene(rng), rng.uniform(0, 600)
        times_s = start_s + np.arange(_CHUNKS * config.frames_per_chunk) / config.fps
        clips.append(world.render(scene, times_s, config.width, config.height))
    return clips


def camera_clips(config: ModelConfig, count: int, chunks: int = _CHUNKS) -> list[Pictures]:
    """Generic pictures, such as a camera sees."""
    frames = chunks * config.frames_per_chunk
    return [
        generic_clip(item_rng(GENERIC_SEED, number), frames, config.width, config.height) for number in range(count)
    ]


@torch.inference_mode()
def coded(codec: PocketCodec, frames_THWC: Pictures) -> Pictures:
    """Encoded and decoded."""
    frames = pixels_to_frames(torch.from_numpy(frames_THWC))[None]
    return np.asarray(frames_to_pixels(codec.decode(codec.encode(frames))[0]).numpy())


def codec_psnr_db(codec: PocketCodec, clips: Iterable[Pictures]) -> float:
    """Mean over the clips, whole pictures."""
    return float(np.mean([psnr_db(coded(codec, clip), clip) for clip in clips]))


@torch.inference_mode()
def streaming_gap(codec: PocketCodec, clips: Iterable[Pictures], frames_per_chunk: int) -> float:
    """The largest difference, in latents or in pictures from -1 to 1, between chunk by chunk and all at once."""
    gap = 0.0
    for clip in clips:
        frames = pixels_to_frames(torch.from_numpy(clip))
        whole = codec.encode(frames[None])
        encoder, decoder = CodecMemory(), CodecMemory()
        parts = [codec.encode_push(encoder, part) for part in frames.split(frames_per_chunk)]
        latents = torch.cat([part for part in parts if part is not None])
        made = torch.cat([codec.decode_push(decoder, part) for part in whole[0].split(1)])
        gap = max(gap, (latents - whole[0]).abs().max().item(), (made - codec.decode(whole)[0]).abs().max().item())
    return gap


def background_noises(
    codec: PocketCodec,
    config: ModelConfig,
    asked: Sequence[Ask],
    made_THWC: Sequence[Pictures],
    centres_BT2: NDArray[np.float64],
) -> list[Noise]:
    """For each clip, from its stream's opening: the unrest beside the mover's path, in it and in its coded render.

    centres: where the probe saw the mover; they and the true ones are left out.
    """
    noises = []
    for ask, made, seen in zip(asked, made_THWC, centres_BT2, strict=True):
        times_s = np.arange(len(made)) / config.fps
        true = world.track(ask.scene, times_s, config.width, config.height) / (config.width, config.height)
        away = background(np.concatenate([true, seen]), config.height, config.width)
        render = world.render(ask.scene, times_s, config.width, config.height)
        noises.append(background_noise(made, coded(codec, render), away))
    return noises
