"""One scenario chunk by chunk: a sparse stream, and every chunk once more densely from the same state.

The dense chunk has the same noise, so that pictures and times pair up. Another with other noise says how much of a
difference means nothing. Figures are told over any stretch of chunks. Knows neither scenes nor files.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np

from app import region_figures as figures
from app.perceptual import Distance, perceived
from app.region_bytes import Encoder
from app.region_speed import Row, Spent, paired, timed
from pipeline.chunk import Chunk, Controls

Shot = tuple[
    np.ndarray | None, np.ndarray | None
]  # a chunk's true pictures, and as the camera sees them; of a text none
Figures = dict[str, float | None]

FIRST = 3  # the first chunk in which something can be held
DRAWS = 4  # of a text's chunk, to tell motion from chance
OTHER_SEED = 1_000_003
# A figure over that of the dense chunk, or of chance.
RATIOS = {
    "static_error_ratio": ("static", "static_0"),
    "seam": ("seam", "seam_0"),
    "pop": ("pop", "pop_0"),
    "flow_ratio": ("flow", "flow_0"),
}
BYTES = "encoded_bytes_ratio"
GAPS = ("motion_gap", "probe_gap", "fd_ratio")  # of free runs
MEANS = ("psnr_active", "ssim_active", "gmsd_active", "lpips_active", "ghost")


@dataclass(frozen=True)
class Seen:
    """A chunk of the sparse stream beside its dense twin.

    truth_HW: tiles that moved. active_HW: those that were computed; asked_HW: of them, those not for their age alone.
    figures: none of a chunk that was dense itself. sparse_bytes, dense_bytes: encoded pictures; the latter those of a
    stream that was dense from its beginning.
    """

    index: int
    dense: Spent
    sparse: Spent
    truth_HW: np.ndarray
    active_HW: np.ndarray
    asked_HW: np.ndarray
    figures: Figures
    sparse_bytes: int
    dense_bytes: int


@dataclass(frozen=True)
class Last:
    """The last picture of the chunk before, as shown and as its dense twin had it, and the tiles computed for it."""

    shown_HWC: np.ndarray
    dense_HWC: np.ndarray
    active_HW: np.ndarray


def watch(
    engine: Any, controls: Controls, shots: Sequence[Shot], lpips: Distance | None = None, *, true_mask: bool = False
) -> list[Seen]:
    """From the first chunk on in which something can be held.

    true_mask: each chunk is given the mask of what truly moved, by the shots of a scene; the engine is a `GivenEngine`.
    """
    state, plain, seen = engine.open(controls.seed), replace(controls, regions=0.0), []
    stood_on_HWC: np.ndarray | None = None  # the true pictures that tiles were made from
    last: Last | None = None
    apart = engine.open(controls.seed)  # all of it dense, on its own past
    config = engine.config
    encoders = [Encoder(config.width, config.height, config.fps) for _ in range(2)]
    for index, (true, source) in enumerate(shots):
        before = deepcopy(state)
        if true_mask and true is not None and stood_on_HWC is not None:
            engine.given_HW = figures.true_change(true, stood_on_HWC)
        chunk, sparse = timed(partial(engine.step, state, controls, source))
        active_HW = np.ones(engine.config.tiles, bool) if chunk.active_HW is None else chunk.active_HW
        other: Chunk = chunk
        shown = (chunk, engine.step(apart, plain, source))
        sizes = [encoder.push(each.frames_THWC) for encoder, each in zip(encoders, shown, strict=True)]
        if index >= FIRST:
            assert last is not None, "something was shown before anything is held"
            other, dense = timed(partial(engine.step, deepcopy(before), plain, source))
            held_THWC = held_pictures(engine, before)
            count = DRAWS if true is None else 1 if chunk.active_HW is None else 2
            draws = [other, *(redrawn(engine, before, plain, source, number) for number in range(1, count))]
            # What the held tiles stand on against what is there now. For text, against several dense draws of the
            # chunk: what changes no more than they differ among themselves is texture drawn afresh, and no motion.
            if true is None or stood_on_HWC is None:
                truth_HW = figures.true_motion([draw.frames_THWC for draw in draws], held_THWC)
            else:
                truth_HW = figures.true_change(true, stood_on_HWC)
            asked_HW = active_HW if chunk.refreshed_HW is None else active_HW & ~chunk.refreshed_HW
            found: Figures = {}
            if chunk.active_HW is not None:
                found = compare(chunk, other, draws[1], last, truth_HW, held_THWC, lpips)
            seen.append(Seen(index, dense, sparse, truth_HW, active_HW, asked_HW, found, *sizes))
        if true is not None:
            stood_on_HWC = true[-1].copy() if stood_on_HWC is None else stood_on_HWC
            pixels = figures.over_pixels(active_HW)
            stood_on_HWC[pixels] = true[-1][pixels]
        last = Last(chunk.frames_THWC[-1], other.frames_THWC[-1], active_HW)
    return seen


def told(seen: list[Seen]) -> Row:
    """The figures of a stretch of chunks."""
    recall, _ = figures.recall_and_precision([(each.truth_HW, each.active_HW) for each in seen])
    _, precision = figures.recall_and_precision([(each.truth_HW, each.asked_HW) for each in seen])

    def of(name: str) -> float | None:
        return figures.mean([each.figures.get(name) for each in seen])

    return {
        "active_fraction": figures.mean([float(each.active_HW.mean()) for each in seen]),
        **paired([each.dense for each in seen], [each.sparse for each in seen]),
        **{name: of(name) for name in MEANS},
        **{name: figures.ratio(of(ours), of(theirs)) for name, (ours, theirs) in RATIOS.items()},
        "mask_recall": recall,
        "mask_precision": precision,
        BYTES: sum(each.sparse_bytes for each in seen) / sum(each.dense_bytes for each in seen),
    }


def stretches(name: str, seen: list[Seen], parts: Mapping[str, range] = MappingProxyType({})) -> list[Row]:
    """The figures of a whole scenario, and of the parts of it that are told by themselves."""
    rows = [{"scenario": name} | told(seen)]
    for part, chunks in parts.items():
        rows.append({"scenario": f"{name}, {part}"} | told([each for each in seen if each.index in chunks]))
    return rows


def redrawn(engine: Any, before: Any, plain: Controls, source: np.ndarray | None, number: int) -> Chunk:
    """The dense chunk with other noise."""
    state = deepcopy(before)
    state.seed += number * OTHER_SEED
    chunk: Chunk = engine.step(state, replace(plain, seed=state.seed), source)
    return chunk


def held_pictures(engine: Any, state: Any) -> np.ndarray:
    """What the tiles hold, as a dense stream shows it while it stands: the pictures of one latent frame."""
    import torch

    from pipeline.codec import frames_to_pixels

    codec, latents_TCHW = engine.codec, state.regions.latent_BCHW.expand(2, -1, -1, -1)
    with torch.inference_mode():
        frames_TCHW = codec.decode_push(codec.remember(), latents_TCHW)[-engine.config.codec.frames :]
    pictures: np.ndarray = frames_to_pixels(frames_TCHW).cpu().numpy()
    return pictures


def compare(
    ours: Chunk,
    dense: Chunk,
    again: Chunk,
    last: Last,
    truth_HW: np.ndarray,
    held_THWC: np.ndarray,
    lpips: Distance | None,
) -> Figures:
    """ours and dense from one state with the same noise, again with other noise; what was held before.

    A pop is a step into the chunk where tiles end being held. A dense stream steps from its own picture there.
    """
    assert ours.active_HW is not None, "a chunk that is dense itself has nothing to compare"
    refreshed = np.zeros_like(ours.active_HW) if ours.refreshed_HW is None else ours.refreshed_HW
    moved, ends = ours.active_HW & ~refreshed, (ours.active_HW & ~last.active_HW) | refreshed
    a, b, c = ours.frames_THWC, dense.frames_THWC, again.frames_THWC
    area, held = figures.over_pixels(moved), ~figures.over_pixels(ours.active_HW)
    fresh, changed = figures.over_pixels(ends), figures.over_pixels(truth_HW)
    # A held tile shows the last of its latent frame's pictures, and a decoder draws each of them a little differently.
    chance, flicker = figures.rms(c, b, held), figures.rms(held_THWC, held_THWC[-1:], held)
    return {
        "psnr_active": figures.psnr(a, b, area),
        "ssim_active": figures.ssim(a, b, area),
        "gmsd_active": figures.gmsd(a, b, area),
        "lpips_active": perceived(lpips, a, b, area),
        "ghost": figures.ghost(a, b, c, last.shown_HWC, changed),
        "static": figures.rms(a, b, held),
        "static_0": None if chance is None or flicker is None else float(np.hypot(chance, flicker)),
        "seam": figures.seam(a, moved),
        "seam_0": figures.seam(b, moved),
        "pop": figures.pop(last.shown_HWC, a, fresh),
        "pop_0": figures.pop(last.dense_HWC, b, fresh),
        "flow": figures.flow_energy(a, area),
        "flow_0": figures.flow_energy(b, area),
    }
