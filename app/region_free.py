"""Free runs: a sparse stream and a dense one of the same ask, each on its own past, read by the probe.

Their pictures part after some chunks, so they are not compared with each other but each with what was asked for.
Knows no clock.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from app.region_run import GAPS
from pipeline.chunk import Controls
from pipeline.training import asks, world
from pipeline.training.asks import Ask
from pipeline.training.evaluate import CLIP_FRAMES, Drawn, Pictures, Quality, clip_chunks, distance
from pipeline.training.measures import agreement
from pipeline.training.probe import Answers, Probe
from pipeline.training.probe_clips import shrink, view, view_times_s


def free_run(
    engine: Any, probe: Probe, dial: float, chunks: int, follows: bool, streams: int
) -> dict[str, float | None]:
    """`probe_gap`, `motion_gap`: what the dense streams get right more often than the sparse ones, as a share.

    `fd_ratio`: the sparse streams' distance from renders in the probe's features, over the dense ones'. Each with its
    standard error over streams, `..._error`. follows: the streams follow renders of the scene, as they would a camera.
    """
    asked = asks.asks(asks.DRIFT_SEED, streams)
    dense, sparse = (drawn(engine, probe, asked, regions, chunks, follows) for regions in (0.0, dial))
    return with_errors(asked, dense, sparse, _renders(engine, probe, asked, chunks))


def with_errors(asked: list[Ask], dense: Drawn, sparse: Drawn, real: Drawn) -> dict[str, float | None]:
    """The gaps and their standard errors, by leaving out one stream after the other (the jackknife).

    The clips of one stream are not independent, so it is streams that are counted. None: from one stream alone.
    """
    streams = range(len(asked))
    found = gaps(asked, dense, sparse, real, list(streams))
    alone = len(streams) == 1
    left = (
        []
        if alone
        else [gaps(asked, dense, sparse, real, [each for each in streams if each != out]) for out in streams]
    )
    return found | {f"{name}_error": jackknife_error([each[name] for each in left]) for name in GAPS}


def jackknife_error(left_out: list[float | None]) -> float | None:
    """Standard error of an estimate, from the estimates without one part each. None: unknown."""
    known = [value for value in left_out if value is not None]
    if len(known) < 2 or len(known) < len(left_out):
        return None
    return float(np.sqrt((len(known) - 1) * np.var(known)))


def gaps(asked: list[Ask], dense: Drawn, sparse: Drawn, real: Drawn, streams: list[int]) -> dict[str, float | None]:
    """Of these streams alone."""
    ours, theirs, renders = (_of(each, streams, len(asked)) for each in (sparse, dense, real))
    words = [asked[stream].words for stream in streams for _ in range(len(ours.clips_BTCHW) // len(streams))]
    right, without = (Quality(agreement(each.answers.words, words), None, None) for each in (theirs, ours))
    far, near = distance(ours, renders), distance(theirs, renders)
    return {
        "motion_gap": right.agreed["motion"] - without.agreed["motion"] if "motion" in right.agreed else None,
        "probe_gap": right.score - without.score,
        "fd_ratio": far / near if near else None,
    }


def _of(made: Drawn, streams: list[int], count: int) -> Drawn:
    """The clips of these of `count` streams, which stand stream after stream."""
    each, answers = len(made.clips_BTCHW) // count, made.answers
    places = [stream * each + clip for stream in streams for clip in range(each)]
    chosen = Answers([answers.words[place] for place in places], answers.centres_BT2[places], answers.features[places])
    return Drawn(made.clips_BTCHW[places], chosen, [])


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
