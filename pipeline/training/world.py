"""The procedural world that the pocket student learns from: one or two movers before a still backdrop.

A Scene is plain words plus a layout seed; a picture of it at any time is a pure function of both, in closed form.
A scene on the grid starts in the middle and comes back to the same places: every path repeats after a whole number of
half seconds, the time of a chunk, so what a small model has to know of a mover is a short list of poses, and a stream
that goes on for hours stays in it. A free scene starts anywhere, at any size and pace: what a camera sees.
What a scene is called is the business of `captions`.
"""

from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipeline.training.places import PLACES, backdrop
from pipeline.training.shapes import PALETTE, STYLES, SUBJECTS, sprite

COLOURS = tuple(PALETTE)
MOTIONS = ("moves left", "moves right", "bounces", "circles", "sways", "stands still")
SPEEDS = ("slowly", "", "quickly")
_PACE = {"slowly": 32.0, "": 64.0, "quickly": 128.0}  # pixels a second in a picture 192 high
_TRAVELS = ("moves left", "moves right")  # these leave at one edge and come in at the other
_SECOND_SHARE = 0.2
_SECOND_SIZE = 0.72
_REACH = 1.1  # of a mover, in radii

__all__ = [
    "COLOURS",
    "MOTIONS",
    "PLACES",
    "SPEEDS",
    "STYLES",
    "SUBJECTS",
    "Scene",
    "mover_cells",
    "render",
    "sample_scene",
    "track",
]


@dataclass(frozen=True)
class Scene:
    """Attributes by name. All numbers (start, phase, size, pace, decoration) follow from `free` and layout_seed.

    second: colour and subject of a smaller mover that makes the same motion elsewhere, or None.
    free: off the grid.
    """

    subject: str
    colour: str
    motion: str
    speed: str
    place: str
    style: str
    second: tuple[str, str] | None
    layout_seed: int
    free: bool = False


@dataclass(frozen=True)
class _Layout:
    x: float  # home, as a share of the width
    y: float  # home, as a share of the height
    phase: float
    radius: float  # as a share of the height
    haste: float = 1.0  # times the speed's pace


@dataclass(frozen=True)
class _Pose:
    """One mover at many times: centres in pixels, tilt in radians, stretch upwards (1 = none)."""

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    tilt: NDArray[np.float64]
    stretch: NDArray[np.float64]


def sample_scene(rng: np.random.Generator) -> Scene:
    def pick(names: tuple[str, ...]) -> str:
        return names[int(rng.integers(len(names)))]

    subject, colour = pick(SUBJECTS), pick(COLOURS)
    second = None
    if rng.random() < _SECOND_SHARE:
        others = tuple(name for name in COLOURS if name != colour)
        second = (pick(others), pick(tuple(name for name in SUBJECTS if name != subject)))
    motion = pick(MOTIONS)
    speed = "" if motion == "stands still" else pick(SPEEDS)
    return Scene(subject, colour, motion, speed, pick(PLACES), pick(STYLES), second, int(rng.integers(2**31)))


def _layout(scene: Scene) -> _Layout:
    if not scene.free:
        return _Layout(x=0.5, y=0.5, phase=0.0, radius=0.23)
    draws = np.random.Generator(np.random.Philox(np.random.SeedSequence((scene.layout_seed, 1)))).random(5)
    return _Layout(
        x=0.2 + 0.6 * draws[0],
        y=0.4 + 0.2 * draws[1],
        phase=float(draws[2]),
        radius=0.16 + 0.12 * draws[3],
        haste=0.75 + 0.55 * float(draws[4]),  # slow stays slower than plain, whatever is drawn
    )


def _pose(scene: Scene, home: _Layout, times_s: ArrayLike, width: int, height: int) -> _Pose:
    t = np.asarray(times_s, float)
    unit = height / 192
    pace = _PACE[scene.speed] * home.haste * unit
    x, y = np.full(t.shape, home.x * width), np.full(t.shape, home.y * height)
    tilt, stretch = np.zeros(t.shape), np.ones(t.shape)
    turn = 2 * np.pi * home.phase
    if scene.motion in _TRAVELS:
        direction = -1 if scene.motion == "moves left" else 1
        x = np.mod((home.phase + home.x) * width + direction * pace * t, width)
        step = 2 * np.pi * t * pace / (64 * unit) + turn
        y = y - 4 * unit * np.sin(step)
        tilt = 0.09 * np.sin(step + 0.8)
    elif scene.motion == "bounces":
        rise = 62 * unit
        beat = np.mod(t * pace / (128 * unit) + 0.25 + home.phase, 1.0)
        hop = 4 * beat * (1 - beat)
        y = y + 0.16 * height - rise * hop
        stretch = 1.06 - 0.2 * np.exp(-hop * 9)
    elif scene.motion == "circles":
        angle = 2 * np.pi * t * pace / (256 * unit) + turn
        x, y = x + 64 * unit * np.cos(angle), y + 36 * unit * np.sin(angle)
    elif scene.motion == "sways":
        reach = 40 * unit
        swing = np.sin(2 * np.pi * t * pace / (192 * unit) + turn)
        x, tilt = x + reach * swing, 0.24 * swing
    return _Pose(x, y, tilt, stretch)


def _companion(scene: Scene, home: _Layout) -> _Layout:
    """Where the second mover lives: the same motion, apart in space and in phase, and nearer to the horizon."""
    other = replace(home, radius=home.radius * _SECOND_SIZE)
    if scene.motion == "circles" or scene.motion in _TRAVELS:
        return replace(other, phase=home.phase + 0.5)
    lag = 0.25 if scene.motion == "bounces" else 0.0
    return replace(other, x=home.x + (-0.3 if home.x > 0.5 else 0.3), phase=home.phase + lag)


def track(scene: Scene, times_s: ArrayLike, width: int = 320, height: int = 192) -> NDArray[np.float64]:
    """Centres of the main mover in pixels, (T, 2) as x, y. On the way round an edge, x jumps by the width."""
    pose = _pose(scene, _layout(scene), times_s, width, height)
    return np.stack([pose.x, pose.y], axis=1)


def mover_cells(scene: Scene, times_s: ArrayLike, rows: int, columns: int) -> NDArray[np.bool_]:
    """Cells of a picture that the main mover touches at any of the times, (rows, columns)."""
    centres = track(scene, times_s, columns, rows)
    x, y = np.arange(columns) + 0.5, (np.arange(rows) + 0.5)[:, None]
    reach = rows * _layout(scene).radius * _REACH + 0.5
    across = x - centres[:, :1]
    across -= columns * np.rint(across / columns)
    away = np.hypot(across[:, None, :], y - centres[:, 1, None, None])
    return np.asarray((away < reach).any(0))


def render(scene: Scene, times_s: ArrayLike, width: int = 320, height: int = 192) -> NDArray[np.uint8]:
    """Pictures at the given times, uint8 RGB (T, H, W, 3)."""
    still, showing = backdrop(scene.place, scene.style, scene.layout_seed, width, height)
    times = np.asarray(times_s, float)
    frames_THWC = np.empty((len(times), height, width, 3), np.uint8)
    frames_THWC[:] = still.astype(np.uint8)
    laps = (-width, 0, width) if scene.motion in _TRAVELS else (0,)
    home = _layout(scene)
    cast = [(scene.subject, scene.colour, home)]
    if scene.second is not None:
        cast.insert(0, (scene.second[1], scene.second[0], _companion(scene, home)))
    for subject, colour, layout in cast:
        art = sprite(subject, colour, scene.style, layout.radius * height)
        if scene.motion == "moves left":
            art = art[:, ::-1]
        pose = _pose(scene, layout, times, width, height)
        for k, frame_HWC in enumerate(frames_THWC):
            for lap in laps:
                x, y = float(pose.x[k]) + lap, float(pose.y[k])
                _place(frame_HWC, showing, art, x, y, float(pose.tilt[k]), float(pose.stretch[k]))
    return frames_THWC


def _place(
    frame_HWC: NDArray[np.uint8],
    showing: NDArray[np.float32] | None,
    art: NDArray[np.float32],
    x: float,
    y: float,
    tilt: float,
    stretch: float,
) -> None:
    """Blend premultiplied art into the frame with its centre at (x, y), touching only its bounding box."""
    height, width = frame_HWC.shape[:2]
    side = art.shape[0]
    reach = side / 2 + 1
    left, right = max(0, int(np.floor(x - reach))), min(width, int(np.ceil(x + reach)) + 1)
    top, bottom = max(0, int(np.floor(y - reach))), min(height, int(np.ceil(y + reach)) + 1)
    if left >= right or top >= bottom:
        return
    cos, sin, middle = np.cos(tilt), np.sin(tilt), (side - 1) / 2
    turn = np.array([[cos, -sin], [sin, cos]]) @ np.diag([1 / stretch, stretch])
    shift = np.array([x - left, y - top]) - turn @ (middle, middle)
    moved = cv2.warpAffine(art, np.column_stack([turn, shift]), (right - left, bottom - top))
    if showing is not None:
        moved = moved * showing[top:bottom, left:right]
    box = frame_HWC[top:bottom, left:right]
    blended = box * (1 - moved[..., 3:]) + moved[..., :3]
    box[:] = np.minimum(blended + 0.5, 255).astype(np.uint8)
