"""Free runs: a sparse stream and a dense one of the same ask, each on its own past, read by the probe.

Their pictures part after some chunks, so they are not compared with each other but each with what was asked for.
Knows no clock.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from pipeline.chunk import Controls
from pipeline.training import asks, world
from pipeline.training.asks import Ask
from pipeline.training.evaluate import CLIP_FRAMES, Drawn, Pictures, clip_chunks, distance, quality
from pipeline.training.probe import Probe
from pipeline.training.probe_clips import shrink, view, view_times_s

STREAMS = 3


def free_run(engine: Any, probe: Probe, dial: float, chunks: int, follows: bool) -> dict[str, float | None]:
    """`probe_gap`, `motion_gap`: what the dense streams get right more often than the sparse ones, as a share.

    `fd_ratio`: the sparse streams' distance from renders in the probe's features, over the dense ones'. follows: the
    streams follow renders of the scene, as they would a camera.
    """
    asked = asks.asks(asks.DRIFT_SEED, STREAMS)
    made = [drawn(engine, probe, asked, regions, chunks, follows) for regions in (0.0, dial)]
    real = _renders(engine, probe, asked, chunks)
    every = [ask for ask in asked for _ in range(_clips(engine, chunks))]
    dense, sparse = (quality(each, real, every, engine.config, start_s=1.0) for each in made)
    moves = "motion" in dense.agreed
    far = [distance(each, real) for each in made]
    return {
        "probe_gap": dense.score - sparse.score,
        "motion_gap": dense.agreed["motion"] - sparse.agreed["motion"] if moves else None,
        "fd_ratio": far[1] / far[0] if far[0] else None,
    }


def drawn(engine: Any, probe: Probe, asked: list[Ask], regions: float, chunks: int, follows: bool) -> Drawn:
    """Every whole clip of each stream."""
    each, views = clip_chunks(engine.config), []
    for ask in asked:
        state, controls = engine.open(ask.seed), replace(Controls(ask.prompt, ask.seed), regions=regions)
        for _ in range(_clips(engine, chunks)):
            parts = [
                engine.step(state, controls, _seen(engine, ask, state.index) if follows else None).frames_THWC
                for _ in range(each)
            ]
            views.append(view(np.concatenate(parts)[:CLIP_FRAMES]))
    clips = torch.stack(views)
    return Drawn(clips, probe.read(clips), [])


def _clips(engine: Any, chunks: int) -> int:
    return max(1, chunks // clip_chunks(engine.config))


def _seen(engine: Any, ask: Ask, chunk: int) -> Pictures:
    config = engine.config
    times_s = (chunk * config.frames_per_chunk + np.arange(config.frames_per_chunk)) / config.fps
    return world.render(ask.scene, times_s, config.width, config.height)


def _renders(engine: Any, probe: Probe, asked: list[Ask], chunks: int) -> Drawn:
    """The scenes at the times of the streams' clips."""
    config = engine.config
    each_s = clip_chunks(config) * config.frames_per_chunk / config.fps
    clips = torch.stack(
        [
            torch.from_numpy(
                shrink(world.render(ask.scene, view_times_s(config, clip * each_s), config.width, config.height))
            ).permute(0, 3, 1, 2)
            for ask in asked
            for clip in range(_clips(engine, chunks))
        ]
    ).contiguous()
    return Drawn(clips, probe.read(clips), [])
