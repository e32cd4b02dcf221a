"""Webcam-like pictures that are not of the world: people before rooms, lights in the dark, gradients, edges, writing.

They teach the autoencoder to carry what a camera sees. They have no captions and follow no scene.
"""

from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipeline.training.shapes import Brush, ellipse, rectangle, rounded

Rng = np.random.Generator
Picture = NDArray[np.uint8]
_SPARE = 1.3  # a still is painted larger than the frame, so that the camera can pan and zoom


def generic_clip(rng: Rng, frames: int, width: int, height: int) -> NDArray[np.uint8]:
    """A clip of one randomly chosen kind, uint8 RGB (frames, height, width, 3)."""
    kind = _KINDS[int(rng.integers(len(_KINDS)))]
    still, layers = kind(rng, round(width * _SPARE), round(height * _SPARE))
    shake, zoom_rate, noise = rng.random() < 0.4, rng.normal(0, 0.015), rng.choice((0, 2.0, 4.0))
    drift, light = rng.normal(0, 8, 2) * (rng.random() < 0.5), rng.random(3)
    sway, unit = rng.uniform(0.5, 3, (2, 2)), height / 192
    grain = _grain(rng, width, height, float(noise))
    frames_THWC = np.empty((frames, height, width, 3), np.uint8)
    for k in range(frames):
        t = k / 16
        picture = still
        for layer in layers:
            picture = layer(picture, t)
        hand = 1.5 * np.sin(2 * np.pi * sway[0] * t + sway[1]) if shake else np.zeros(2)  # a hand-held camera
        pan = (drift * t + hand) * unit
        zoom = 1 + np.clip(zoom_rate * t, -0.15, 0.15)
        frame = _look(picture, pan, float(zoom), width, height)
        gain = 1 + 0.25 * light[0] * np.sin(2 * np.pi * (light[1] * 0.7 * t + light[2])) * (light[0] > 0.5)
        if abs(gain - 1) > 1e-3:
            frame = cv2.convertScaleAbs(frame, alpha=float(gain))
        if noise:
            row, column = int(rng.integers(32)), int(rng.integers(32))
            frame = cv2.add(frame, grain[row : row + height, column : column + width], dtype=cv2.CV_8U)
        frames_THWC[k] = frame
    return frames_THWC


_Layer = Callable[[Picture, float], Picture]
_Kind = Callable[[Rng, int, int], tuple[Picture, list[_Layer]]]


def _grain(rng: Rng, width: int, height: int, level: float) -> NDArray[np.int16]:
    return rng.normal(0, level, (height + 32, width + 32, 3)).astype(np.int16)


def _look(picture: Picture, pan: NDArray[np.float64], zoom: float, width: int, height: int) -> Picture:
    """The frame that a camera sees of the larger still."""
    rows, columns = picture.shape[:2]
    x, y = pan
    matrix = np.array([[zoom, 0, width / 2 - zoom * (columns / 2 + x)], [0, zoom, height / 2 - zoom * (rows / 2 + y)]])
    return np.asarray(cv2.warpAffine(picture, matrix, (width, height), borderMode=cv2.BORDER_REFLECT), np.uint8)


def _colour(rng: Rng, low: float = 0, high: float = 255) -> NDArray[np.float64]:
    """Greyish more often than vivid, as rooms are."""
    grey = rng.uniform(low, high)
    return np.asarray(np.clip(grey + rng.normal(0, 1, 3) * rng.choice((10, 30, 70)), low, high))


def _ramp(rng: Rng, width: int, height: int, low: float = 0, high: float = 255) -> Picture:
    corners = np.stack([_colour(rng, low, high) for _ in range(4)]).reshape(2, 2, 3).astype(np.float32)
    x, y = np.linspace(0, 1, width, dtype=np.float32), np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
    across = corners[:, :1] * (1 - x)[:, None] + corners[:, 1:] * x[:, None]
    return np.asarray(across[:1] * (1 - y) + across[1:] * y, np.uint8)


def _path(rng: Rng, width: int, height: int) -> Callable[[float], tuple[float, float]]:
    """A smooth wandering position."""
    middle = rng.uniform(0.25, 0.75, 2) * (width, height)
    reach, rate, phase = rng.uniform(0.02, 0.3, 2), rng.uniform(0.05, 0.6, 2), rng.random(2)

    def at(t: float) -> tuple[float, float]:
        x, y = middle + reach * (width, height) * np.sin(2 * np.pi * (rate * t + phase))
        return float(x), float(y)

    return at


def _moving(rng: Rng, width: int, height: int, points: NDArray[np.float64], colour: ArrayLike) -> _Layer:
    """A form that wanders and turns, drawn over a copy of the still."""
    path, spin = _path(rng, width, height), rng.normal(0, 0.8) * (rng.random() < 0.4)

    def layer(picture: Picture, t: float) -> Picture:
        picture = picture.copy()
        cos, sin = np.cos(spin * t), np.sin(spin * t)
        Brush(picture, (1, 1)).fill(points @ np.array([[cos, sin], [-sin, cos]]) + path(t), colour)
        return picture

    return layer


def _blob(rng: Rng, size: float) -> NDArray[np.float64]:
    angles = np.linspace(0, 2 * np.pi, int(rng.integers(3, 8)), endpoint=False) + rng.uniform(0, 6)
    radii = size * rng.uniform(0.6, 1.0, angles.shape)
    corners = np.stack([np.cos(angles) * radii, np.sin(angles) * radii], 1)
    return rounded(corners, float(rng.choice((0.02, 0.2, 0.45))))


def _room(rng: Rng, width: int, height: int) -> Picture:
    picture = _ramp(rng, width, height, 30, 235)
    brush = Brush(picture, (1, 1))
    if rng.random() < 0.6:  # a window
        left, top = rng.uniform(0, 0.8) * width, rng.uniform(0, 0.3) * height
        brush.fill(rectangle(left, top, left + 0.3 * width, top + 0.5 * height), _colour(rng, 150, 255))
        brush.line([(left + 0.15 * width, top), (left + 0.15 * width, top + 0.5 * height)], _colour(rng), 3)
    if rng.random() < 0.7:  # shelves with books
        left, span = rng.uniform(0, 0.7) * width, rng.uniform(0.2, 0.5) * width
        for shelf in range(int(rng.integers(1, 4))):
            floor = height * (0.25 + 0.25 * shelf)
            x = left
            while x < left + span - 16:
                thick, tall = rng.uniform(5, 16), rng.uniform(0.08, 0.2) * height
                brush.fill(rectangle(x, floor - tall, x + thick, floor), _colour(rng, 20, 220))
                x += thick + rng.choice((1, 1, 14))
            brush.fill(rectangle(left - 4, floor, left + span, floor + 5), _colour(rng, 20, 160))
    return np.asarray(cv2.GaussianBlur(picture, (0, 0), float(rng.uniform(0.6, 2.5))), np.uint8)


def _person(rng: Rng, width: int, height: int) -> tuple[Picture, list[_Layer]]:
    skin = np.array((232, 190, 162)) * rng.uniform(0.35, 1.05) * rng.uniform(0.92, 1.08, 3)
    shirt, hair = _colour(rng, 20, 235), _colour(rng, 10, 150)
    size = rng.uniform(0.16, 0.3) * height
    path, nod = _path(rng, width, height), rng.uniform(0.2, 1.2)
    home = np.array((rng.uniform(0.35, 0.65) * width, rng.uniform(0.38, 0.52) * height))

    def layer(picture: Picture, t: float) -> Picture:
        picture = picture.copy()
        brush = Brush(picture, (size, size))
        x, y = (home + 0.25 * (np.array(path(t)) - (width / 2, height / 2))) / size
        y += 0.05 * np.sin(2 * np.pi * nod * t)
        brush.fill(ellipse(x, y - 0.15, 0.86, 1.08), hair)
        brush.fill(rounded([(x - 2, 9), (x - 1.7, y + 1.4), (x + 1.7, y + 1.4), (x + 2, 9)], 0.12), shirt)
        brush.fill(rectangle(x - 0.32, y + 0.6, x + 0.32, y + 1.5), skin * 0.86)
        brush.fill(ellipse(x, y + 0.05, 0.72, 0.95), skin)
        for side in (-0.3, 0.3):
            brush.fill(ellipse(x + side, y - 0.05, 0.14, 0.08), (235, 232, 228))
            brush.fill(ellipse(x + side, y - 0.05, 0.07, 0.08), (40, 30, 28))
            brush.line([(x + side - 0.16, y - 0.24), (x + side + 0.16, y - 0.26)], hair * 0.8, 0.06)
        brush.line([(x, y), (x - 0.06, y + 0.3), (x + 0.06, y + 0.3)], skin * 0.8, 0.05)
        mouth = 0.05 + 0.05 * np.sin(9 * t)
        brush.fill(ellipse(x, y + 0.56, 0.24, mouth + 0.03), skin * (0.75, 0.5, 0.5))
        return picture

    return _room(rng, width, height), [layer]


def _dark(rng: Rng, width: int, height: int) -> tuple[Picture, list[_Layer]]:
    still = _ramp(rng, width, height, 0, 60)
    layers = []
    for _ in range(int(rng.integers(1, 4))):
        half = rng.uniform(0.06, 0.22, 2) * height
        colour = _colour(rng, 120, 255) if rng.random() < 0.8 else _colour(rng, 0, 20)
        layers.append(_moving(rng, width, height, rectangle(-half[0], -half[1], half[0], half[1]), colour))
    return still, layers


def _gradient(rng: Rng, width: int, height: int) -> tuple[Picture, list[_Layer]]:
    layers = [
        _moving(rng, width, height, _blob(rng, rng.uniform(0.1, 0.35) * height), rng.uniform(0, 255, 3))
        for _ in range(int(rng.integers(0, 3)))
    ]
    corners = rng.uniform(0, 255, (2, 2, 3)).astype(np.float32)
    return np.asarray(np.clip(cv2.resize(corners, (width, height)), 0, 255), np.uint8), layers


def _clouds(rng: Rng, width: int, height: int) -> tuple[Picture, list[_Layer]]:
    """Smooth noise at several scales that slowly turns into another."""
    fields = []
    for _ in range(2):
        field = np.full((height, width, 3), rng.uniform(60, 190, 3), np.float32)
        for cells, level in ((2, 60), (5, 35), (12, 18), (30, 8)):
            coarse = rng.normal(0, level, (cells, cells * 5 // 3 + 1, 3)).astype(np.float32)
            field += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
        fields.append(np.asarray(np.clip(field, 0, 255), np.uint8))
    rate = rng.uniform(0.05, 0.4)

    def layer(picture: Picture, t: float) -> Picture:
        share = 0.5 - 0.5 * np.cos(2 * np.pi * rate * t)
        return np.asarray(cv2.addWeighted(picture, 1 - share, fields[1], share, 0), np.uint8)

    return fields[0], [layer]


def _edges(rng: Rng, width: int, height: int) -> tuple[Picture, list[_Layer]]:
    picture = _ramp(rng, width, height)
    brush = Brush(picture, (1, 1))
    for _ in range(int(rng.integers(3, 14))):
        middle = rng.uniform(0, 1, 2) * (width, height)
        brush.fill(_blob(rng, rng.uniform(0.08, 0.5) * height) + middle, _colour(rng))
    for _ in range(int(rng.integers(0, 8))):
        brush.line(rng.uniform(0, 1, (2, 2)) * (width, height), _colour(rng), rng.uniform(1, 6))
    form = _blob(rng, rng.uniform(0.1, 0.3) * height)
    return picture, [_moving(rng, width, height, form, rng.uniform(0, 255, 3))]


def _writing(rng: Rng, width: int, height: int) -> tuple[Picture, list[_Layer]]:
    picture = _ramp(rng, width, height, 140, 255) if rng.random() < 0.6 else _ramp(rng, width, height, 0, 80)
    ink = 255 - picture.mean(axis=(0, 1))
    for _ in range(int(rng.integers(2, 8))):
        text = "".join(chr(int(c)) for c in rng.integers(65, 123, int(rng.integers(3, 14))))
        at = (int(rng.uniform(0.05, 0.5) * width), int(rng.uniform(0.1, 0.95) * height))
        unit = height / 250
        size, thickness = float(rng.uniform(0.5, 2.2)) * unit, max(1, round(rng.uniform(1, 5) * unit))
        tone = [float(v) for v in _ink_near(rng, ink)]
        cv2.putText(picture, text, at, cv2.FONT_HERSHEY_SIMPLEX, size, tone, thickness, cv2.LINE_AA)
    form = _blob(rng, rng.uniform(0.08, 0.2) * height)
    return picture, [_moving(rng, width, height, form, _colour(rng))] if rng.random() < 0.5 else []


def _ink_near(rng: Rng, ink: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(np.clip(ink + rng.normal(0, 25, 3), 0, 255))


def _still_life(rng: Rng, width: int, height: int) -> tuple[Picture, list[_Layer]]:
    form = _blob(rng, rng.uniform(0.1, 0.25) * height)
    return _room(rng, width, height), [_moving(rng, width, height, form, rng.uniform(0, 255, 3))]


_KINDS: tuple[_Kind, ...] = (_person, _person, _dark, _gradient, _clouds, _edges, _writing, _still_life)
