"""Measures of what a model drew: pure functions of arrays, in units that a person can check.

They take what the probe read, or pictures, and know neither the probe nor the model. Pictures are uint8 RGB or floats
on the same scale, levels 0 to 255. Centres are (x, y) as shares of width and height, x on a circle: what leaves at one
edge comes in at the other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipeline.training import captions, world

SCORED = ("subject", "colour", "motion", "place", "style")
STILL = 0.25  # below this share of the speed that it should have, a mover counts as standing
_TRAVELS = ("moves left", "moves right")
_REACH = 0.36  # of the height: the largest mover with its glow, and the codec's view of its edge
_LONGEST_CYCLE_S = 9.0  # a slow circle
_FEWEST = 0.02  # of the picture: less background than this says nothing

Floats = NDArray[np.float64]


def psnr_db(made: ArrayLike, real: ArrayLike, peak: float = 255.0) -> float:
    """Peak signal to noise over all pixels, in dB. Arrays of one shape and scale; equal pictures give infinity."""
    error = np.square(np.asarray(made, float) - np.asarray(real, float)).mean()
    return float("inf") if error == 0 else float(10 * np.log10(peak**2 / error))


def frechet_distance(one_ND: ArrayLike, other_ND: ArrayLike) -> float:
    """Squared Frechet distance between normal fits to two sets of features, (N, D) and (M, D); 0 for equal sets.

    It grows as the sets shrink, so compare distances only between sets of the same size, some times D.
    """
    one, other = np.asarray(one_ND, float), np.asarray(other_ND, float)
    here, there = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    values, vectors = np.linalg.eigh(here)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    shared = np.sqrt(np.linalg.eigvalsh(root @ there @ root).clip(0)).sum()
    apart = np.square(one.mean(0) - other.mean(0)).sum()
    return float(max(0.0, apart + np.trace(here) + np.trace(there) - 2 * shared))


def meant(scene: world.Scene, text: str | None = None) -> dict[str, str]:
    """The scene's word for each attribute that can be asked for: all of them, or those that the caption `text` says.

    What stands still has no speed. A named motion without an adverb says the middle speed.
    """
    words = {name: str(getattr(scene, name)) for name in ("subject", "colour", "motion", "speed", "place", "style")}
    if text is not None:
        spelt = f" {' '.join(captions.split(text))} "
        phrases = {
            "motion": (*captions._VERBS[scene.motion], *captions._GERUNDS[scene.motion]),
            "place": captions._PLACES[scene.place],
            "style": (*captions._STYLES[scene.style], *captions._PREFIXES[scene.style]),
        }
        unsaid = [name for name, ways in phrases.items() if not any(f" {way} " in spelt for way in ways)]
        for name in (*unsaid, *(["speed"] if "motion" in unsaid else [])):
            del words[name]
    if scene.motion == "stands still":
        words.pop("speed", None)
    return words


def agreement(read: Sequence[Mapping[str, str]], asked: Sequence[Mapping[str, str]]) -> dict[str, float]:
    """Share of clips, by attribute, in which the word that was read is the one asked for, 0 to 1.

    Only clips that ask for the attribute count; an attribute nobody asks for has no entry.
    """
    right: dict[str, list[bool]] = {}
    for seen, wanted in zip(read, asked, strict=True):
        for name, word in wanted.items():
            right.setdefault(name, []).append(seen[name] == word)
    return {name: float(np.mean(hits)) for name, hits in right.items()}


def score(agreed: Mapping[str, float], names: Sequence[str] = SCORED) -> float:
    """One number for a table: the mean over attributes, each weighing the same."""
    return float(np.mean([agreed[name] for name in names]))


@dataclass(frozen=True)
class Motion:
    """Measured motion against the scenes' own; one entry per clip.

    speed, expected: mean speed along the path in pixels a second. error: of the velocity, relative to the expected
    one; NaN where the scene stands still.
    """

    speed: Floats
    expected: Floats
    error: Floats

    @property
    def median_error(self) -> float:
        """Over the clips that should move; NaN if there is none."""
        moving = self.error[np.isfinite(self.error)]
        return float(np.median(moving)) if len(moving) else float("nan")

    @property
    def still_share(self) -> float:
        return still_share(self.speed, self.expected)


def measure_motion(
    centres_BT2: ArrayLike,
    scenes: Sequence[world.Scene],
    times_s_BT: ArrayLike,
    *,
    width: int = 320,
    height: int = 192,
    phase_known: bool = True,
) -> Motion:
    """Compare centres with the track of each scene at the same times.

    Moving left or right is compared as a signed horizontal velocity, every other motion as the mean speed along its
    path: chords between the same times on both sides, so that the cut corners cancel.
    phase_known: false for pictures from far down a stream, where a bounce may have drifted out of step; each path is
    then compared at the moment of its cycle that it fits best.
    """
    centres, times = np.asarray(centres_BT2, float), np.asarray(times_s_BT, float)
    size = np.array([width, height], float)
    speeds, expected, errors = [], [], []
    for path, scene, times_s in zip(centres, scenes, times, strict=True):
        if not phase_known and scene.motion not in _TRAVELS:
            times_s = times_s + _best_shift_s(path, scene, times_s, size)
        true = world.track(scene, times_s, width, height) / size
        seconds = np.diff(times_s)
        made_px, true_px = _steps(path) * size, _steps(true) * size
        speed, target = (float(np.hypot(*step.T).sum() / seconds.sum()) for step in (made_px, true_px))
        error = abs(speed - target) / target if target else np.nan
        if scene.motion in _TRAVELS:
            made_x, true_x = (_slope(np.cumsum(step[:, 0]), times_s[1:]) for step in (made_px, true_px))
            error = abs(made_x - true_x) / abs(true_x)
        speeds.append(speed)
        expected.append(target)
        errors.append(error)
    return Motion(np.array(speeds), np.array(expected), np.array(errors))


def _steps(path_T2: Floats) -> Floats:
    """From each centre to the next, the short way round."""
    steps = np.diff(path_T2, axis=0)
    steps[:, 0] -= np.rint(steps[:, 0])
    return steps


def _slope(x: Floats, times_s: Floats) -> float:
    """Least squares: one centre that is a little off hardly counts."""
    t = times_s - times_s.mean()
    return float((x * t).sum() / (t * t).sum())


def _best_shift_s(path_T2: Floats, scene: world.Scene, times_s: Floats, size: Floats) -> float:
    shifts_s = np.arange(0, _LONGEST_CYCLE_S, 0.05)
    tracks = world.track(scene, (times_s + shifts_s[:, None]).ravel(), int(size[0]), int(size[1]))
    off = path_T2 - (tracks / size).reshape(len(shifts_s), -1, 2)
    off[..., 0] -= np.rint(off[..., 0])
    return float(shifts_s[np.square(off * size).sum((1, 2)).argmin()])


def still_share(made: ArrayLike, expected: ArrayLike, below: float = STILL) -> float:
    """Share of the clips that should move (expected > 0) in which less than `below` of that motion is made.

    Any measure of motion will do, speeds or `picture_change`; NaN if no clip should move. The probe's centres wander in
    pictures without a clear mover: ask `picture_change` too where there may be such.
    """
    made, expected = np.asarray(made, float), np.asarray(expected, float)
    should = expected > 0
    return float((made[should] < below * expected[should]).mean()) if should.any() else float("nan")


def picture_change(clips_BTCHW: ArrayLike) -> Floats:
    """Mean absolute change from each picture of a clip to the next, in levels, (B,)."""
    clips = np.asarray(clips_BTCHW, np.float32)
    return np.abs(np.diff(clips, axis=1)).mean(axis=(1, 2, 3, 4)).astype(float)


def background(centres_N2: ArrayLike, height: int, width: int, reach: float = _REACH) -> NDArray[np.bool_]:
    """Pixels that are outside the mover's path, (H, W): further than `reach` (a share of the height) from all centres.

    Give the true centres and the measured ones together: a mover off its path is no noise of the background.
    """
    x, y = (np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height
    away = np.ones((height, width), bool)
    for centre_x, centre_y in np.asarray(centres_N2, float):
        across = x - centre_x
        across = (across - np.rint(across)) * width
        away &= np.hypot(across[None, :], ((y - centre_y) * height)[:, None]) > reach * height
    return away


def unrest(frames_THWC: ArrayLike, away_HW: NDArray[np.bool_]) -> float:
    """How much the chosen pixels change over time: root mean square about each one's own mean, in levels."""
    chosen = np.asarray(frames_THWC)[:, away_HW].astype(float)
    return float(np.sqrt(chosen.var(axis=0).mean()))


@dataclass(frozen=True)
class Noise:
    """Unrest of the background in levels, in a made clip and in a render that went through the codec.

    Both are NaN where too little of the picture is outside the path to say.
    """

    made: float
    codec: float

    @property
    def ratio(self) -> float:
        """1 or less: no noisier than the codec. Rounding to 8 bits is taken as the least noise a codec can have."""
        return self.made / max(self.codec, 1 / np.sqrt(12))


def background_noise(made_THWC: ArrayLike, coded_THWC: ArrayLike, away_HW: NDArray[np.bool_]) -> Noise:
    """made: a generated clip. coded: the render of the same scene, encoded and decoded. away: see `background`."""
    if away_HW.mean() < _FEWEST:
        return Noise(float("nan"), float("nan"))
    return Noise(unrest(made_THWC, away_HW), unrest(coded_THWC, away_HW))
