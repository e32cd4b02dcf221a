"""Models that show renders of the world, and a probe that knows every render it may meet."""

from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from pipeline.chunk import Chunk, Controls
from pipeline.config import ModelConfig
from pipeline.training import world
from pipeline.training.asks import Ask
from pipeline.training.measures import meant
from pipeline.training.probe import Answers
from pipeline.training.probe_clips import shrink


@dataclass
class Showing:
    """A stream of `World`."""

    prompts: list[str] = field(default_factory=list)


@dataclass
class World:
    """Shows what it is asked for. still: as it was at the opening. deaf: to every prompt after the first.
    until_s: afterwards it shows noise."""

    config: ModelConfig
    scenes: dict[str, world.Scene]
    still: bool = False
    deaf: bool = False
    until_s: float = float("inf")

    def open(self, seed: int) -> Showing:
        return Showing()

    def step(self, state: Showing, controls: Controls, source_THWC: np.ndarray | None = None) -> Chunk:
        config, each = self.config, self.config.frames_per_chunk
        state.prompts.append(controls.prompt)
        scene = self.scenes[state.prompts[0 if self.deaf else -1]]
        index = len(state.prompts) - 1
        times_s = np.zeros(each) if self.still else (index * each + np.arange(each)) / config.fps
        frames_THWC = world.render(scene, times_s, config.width, config.height)
        if index * each / config.fps >= self.until_s:
            frames_THWC = np.random.default_rng(1).integers(0, 256, frames_THWC.shape, np.uint8)
        return Chunk(index, 0, frames_THWC, np.zeros((config.chunk, 1, 1, 1), np.float32))


def coarse(frames_THWC: np.ndarray) -> np.ndarray:
    return frames_THWC[:, ::4, ::4].astype(np.int16)


class Knowing:
    """A probe that finds the most similar of the renders it was told of."""

    def __init__(self, config: ModelConfig, told: list[tuple[Ask, np.ndarray]]) -> None:
        size = (config.width, config.height)
        self.scenes = [ask.scene for ask, _ in told]
        self.known = np.stack([coarse(shrink(world.render(ask.scene, times_s, *size))) for ask, times_s in told])
        self.centres = np.stack([world.track(ask.scene, times_s, *size) / size for ask, times_s in told])

    def read(self, clips_BTCHW: Tensor) -> Answers:
        words, centres, features = [], [], []
        for clip in clips_BTCHW.permute(0, 1, 3, 4, 2).numpy():
            nearest = int(np.abs(self.known - coarse(clip)).mean((1, 2, 3, 4)).argmin())
            words.append({"speed": "slowly", **meant(self.scenes[nearest])})
            centres.append(self.centres[nearest])
            features.append([*clip.mean((0, 1, 2)), *clip.std((0, 1, 2))])
        return Answers(words, np.stack(centres), np.array(features))


def shown(wide: ModelConfig, asked: list[Ask], **how: bool) -> World:
    return World(wide, {ask.prompt: ask.scene for ask in asked}, **how)
