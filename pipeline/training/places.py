"""Still backdrops: eight places in four styles, each with its own dominant colour and composition.

A backdrop is painted in logical 320x192 units whatever the size asked for. It knows nothing of movers or time.
"""

from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipeline.training.shapes import Brush, Points, ellipse, mix, rectangle, rounded, trace_colour, wash

_SUPERSAMPLE = 2
_W, _H = 320.0, 192.0


class _Backdrop:
    """A canvas in logical units whose colours pass through the style."""

    def __init__(self, style: str, width: int, height: int) -> None:
        self.style = style
        size = (height * _SUPERSAMPLE, width * _SUPERSAMPLE)
        self.canvas = np.zeros((*size, 3), np.uint8)
        self.cover = np.zeros((*size, 1), np.uint8)  # where the foreground hides a mover
        scale = (size[1] / _W, size[0] / _H)
        self._brush, self._cover = Brush(self.canvas, scale), Brush(self.cover, scale)

    def gradient(self, top: float, bottom: float, upper: ArrayLike, lower: ArrayLike) -> None:
        rows = self.canvas.shape[0]
        first, last = round(top / _H * rows), round(bottom / _H * rows)
        s = np.linspace(0, 1, last - first)[:, None]
        colours = np.asarray(upper, float) * (1 - s) + np.asarray(lower, float) * s
        self.canvas[first:last] = wash(self.style, colours).astype(np.uint8)[:, None]

    def form(self, points: Points, colour: ArrayLike, traced: bool = True, front: bool = False) -> None:
        self._brush.fill(points, wash(self.style, colour))
        line = trace_colour(self.style, colour) if traced else None
        if line is not None:
            self._brush.line(points, line, 1.6, closed=True)
        if front:
            self._cover.fill(points, (255, 255, 255))

    def light(self, x: float, y: float, rx: float, ry: float, colour: ArrayLike, amount: float) -> None:
        """A soft pool of light: mixes towards the colour, most in the middle."""
        rows, columns = self.canvas.shape[:2]
        dx = (np.linspace(0, _W, columns, dtype=np.float32) - x) / rx
        dy = (np.linspace(0, _H, rows, dtype=np.float32) - y) / ry
        weight = (amount * np.exp(-dy * dy))[:, None, None] * np.exp(-dx * dx)[None, :, None]
        target = wash(self.style, colour).astype(np.float32)
        self.canvas[:] = (self.canvas + weight * (target - self.canvas)).astype(np.uint8)

    def hill(self, level: float, height: float, phase: float, colour: ArrayLike, waves: float = 1.0) -> None:
        """Ground from a gently waving skyline down to the bottom."""
        x = np.linspace(-4, _W + 4, 60)
        y = level - height * np.sin(2 * np.pi * (x / _W * waves + phase))
        self.form(np.concatenate([np.stack([x, y], 1), [(_W + 4, _H + 4), (-4, _H + 4)]]), colour)

    def finish(self) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        size = (self.canvas.shape[1] // _SUPERSAMPLE, self.canvas.shape[0] // _SUPERSAMPLE)
        picture = np.asarray(cv2.resize(self.canvas, size, interpolation=cv2.INTER_AREA), np.float32)
        if self.style == "neon":
            bloom = np.asarray(cv2.GaussianBlur(picture, (0, 0), size[1] / 40))
            picture = np.minimum(picture + 0.35 * bloom, 255)
        if not self.cover.any():
            return picture, None
        cover = np.asarray(cv2.resize(self.cover[..., 0], size, interpolation=cv2.INTER_AREA), np.float32)
        return picture, np.asarray(1 - cover[..., None] / 255, np.float32)


def _dark_room(b: _Backdrop, r: NDArray[np.float64]) -> None:
    b.gradient(0, 150, (40, 36, 62), (56, 48, 74))
    b.gradient(150, 192, (34, 29, 36), (24, 20, 26))
    window = 38 + 40 * r[0] if r[1] < 0.5 else 216 + 40 * r[0]
    b.form(rectangle(window, 22, window + 58, 88), (60, 76, 122))
    b.form(rectangle(window + 27, 22, window + 31, 88), (38, 34, 48), traced=False)
    b.form(rectangle(window, 53, window + 58, 57), (38, 34, 48), traced=False)
    lamp = (window + 29 + 160) % _W
    b.light(lamp, 78, 52, 56, (150, 112, 74), 0.5)
    b.form(rectangle(lamp - 2, 88, lamp + 2, 160), (30, 26, 30))
    b.form(np.array([(lamp - 10, 62), (lamp + 10, 62), (lamp + 20, 90), (lamp - 20, 90)]), (170, 132, 88))
    b.form(rectangle(-4, 147, _W + 4, 152), (30, 26, 34))


def _theatre(b: _Backdrop, r: NDArray[np.float64]) -> None:
    b.gradient(0, 142, (50, 22, 34), (74, 32, 42))
    b.gradient(142, 192, (122, 78, 52), (84, 48, 36))
    b.light(110 + 100 * r[0], 120, 76, 60, (196, 150, 112), 0.6)
    for side in (0, 1):
        for fold in range(3):
            left = fold * 20.0
            points = [
                (left - 2, -4),
                (left + 22, -4),
                (left + 20 - 3 * fold, 150),
                (left - 2 - 3 * fold, 150),
            ]
            x_y = np.array(points)
            if side:
                x_y[:, 0] = _W - x_y[:, 0]
            b.form(x_y, ((132, 22, 34), (108, 16, 28), (124, 20, 32))[fold])
    for scallop in range(5):
        b.form(ellipse(32 + 64 * scallop, 0, 34, 24), (116, 18, 30))
    shift = 18 * r[1]
    for seat in range(8):
        x = -4 + 46 * seat + shift - 14
        tall = 4 * np.sin(seat * 2.3 + 6.28 * r[2])
        body, head = (30, 18, 30), (42, 26, 38)
        shoulders = [(x - 21, 200), (x - 19, 178 + tall), (x - 7, 170 + tall)]
        shoulders += [(x + 7, 170 + tall), (x + 19, 178 + tall), (x + 21, 200)]
        b.form(rounded(shoulders, 0.25), body, front=True)
        b.form(ellipse(x, 158 + tall, 11, 13), head, front=True)


def _beach(b: _Backdrop, r: NDArray[np.float64]) -> None:
    b.gradient(0, 84, (122, 186, 214), (186, 220, 224))
    sun = 60 + 200 * r[0]
    b.light(sun, 30, 46, 40, (250, 240, 200), 0.7)
    b.form(ellipse(sun, 30, 15, 15), (250, 236, 184))
    b.gradient(84, 192, (40, 126, 158), (128, 206, 200))
    b.hill(128, 3, r[1], (226, 218, 196))
    b.hill(133, 3, r[1], (208, 182, 138))
    side, lean = (24.0, 14.0) if r[2] < 0.5 else (296.0, -14.0)
    trunk = [(side - 5, 170), (side + lean - 3, 62), (side + lean + 3, 62), (side + 5, 170)]
    b.form(np.array(trunk), (132, 98, 68))
    for turn in (-1.0, -0.55, 0.1, 0.62, 1.0):
        tip = np.array((side + lean + 44 * np.sin(turn * 1.6), 62 - 30 * np.cos(turn * 1.6) + 14))
        top = np.array((side + lean, 62.0))
        bow = mix(top, tip, 0.5) + np.array((0, -14))
        b.form(rounded([top, bow - np.array((0, 5)), tip, bow + np.array((0, 7))], 0.25), (66, 124, 84))


def _park(b: _Backdrop, r: NDArray[np.float64]) -> None:
    b.gradient(0, 192, (164, 204, 204), (230, 234, 184))
    b.hill(100, 10, r[0], (120, 160, 104), 0.8)
    b.hill(124, 5, r[0] + 0.4, (96, 140, 80), 0.7)
    path = 120 + 90 * r[1]
    b.form(np.array([(path - 10, 126), (path + 8, 126), (path + 40, 200), (path - 56, 200)]), (186, 172, 136))
    for x, size in ((26 + 24 * r[2], 1.0), (290 - 24 * r[3], 0.86), (96 + 20 * r[3], 0.55)):
        foot = 138 - 22 * (1 - size)
        b.form(rectangle(x - 5 * size, foot - 50 * size, x + 5 * size, foot), (104, 80, 60))
        b.form(ellipse(x, foot - 68 * size, 33 * size, 36 * size), (64, 112, 64))
        b.form(ellipse(x - 9 * size, foot - 78 * size, 15 * size, 15 * size), (84, 134, 78), traced=False)


def _city(b: _Backdrop, r: NDArray[np.float64]) -> None:
    b.gradient(0, 166, (16, 18, 56), (58, 46, 104))
    moon = 50 + 220 * r[0]
    b.light(moon, 30, 34, 30, (150, 150, 190), 0.5)
    b.form(ellipse(moon, 30, 12, 12), (206, 204, 196))
    heights = (84, 52, 104, 66, 94, 46, 78, 100)
    turn = int(r[1] * 8)
    for k in range(8):
        left, top = 41.0 * k - 4, 164.0 - heights[(k + turn) % 8]
        b.form(rectangle(left, top, left + 41, 166), (38, 40, 84) if k % 2 else (30, 32, 72))
        for floor in range(int((160 - top) // 21)):
            for column in (0, 1):
                if (k * 5 + floor * 3 + column * 2 + turn) % 3:
                    x, y = left + 7 + 15 * column, top + 9 + 21 * floor
                    b.form(rectangle(x, y, x + 9, y + 11), (172, 146, 92), traced=False)
    b.gradient(166, 192, (36, 36, 58), (24, 24, 42))
    for dash in range(5):
        x = 72 * dash + 30 * r[2]
        b.form(rectangle(x - 8, 176, x + 26, 180), (116, 110, 116), traced=False)


def _snow(b: _Backdrop, r: NDArray[np.float64]) -> None:
    b.gradient(0, 192, (122, 146, 188), (196, 208, 226))
    b.form(np.array([(-10, 120), (50 + 40 * r[0], 44), (150, 120)]), (138, 156, 190))
    b.form(np.array([(130, 120), (226 + 40 * r[0], 34), (340, 120)]), (150, 166, 198))
    b.hill(112, 7, r[1], (196, 206, 224), 0.8)
    b.hill(140, 6, r[1] + 0.5, (182, 195, 218), 0.8)
    for x, size in ((24 + 20 * r[2], 1.0), (66 + 20 * r[2], 0.66), (294 - 20 * r[3], 0.9)):
        foot = 142 - 24 * (1 - size)
        b.form(rectangle(x - 4 * size, foot - 10, x + 4 * size, foot), (92, 80, 84))
        for tier in range(3):
            y, half = foot - 8 - 22 * tier * size, (26 - 6 * tier) * size
            b.form(np.array([(x - half, y), (x, y - 38 * size), (x + half, y)]), (70, 106, 116))


def _desert(b: _Backdrop, r: NDArray[np.float64]) -> None:
    b.gradient(0, 192, (204, 138, 98), (240, 208, 160))
    sun = 70 + 180 * r[0]
    b.light(sun, 50, 60, 46, (246, 220, 170), 0.7)
    b.form(ellipse(sun, 50, 19, 19), (246, 222, 176))
    b.hill(106, 14, r[1], (190, 138, 98), 0.9)
    b.hill(134, 10, r[1] + 0.45, (168, 116, 82), 0.8)
    b.hill(164, 7, r[1] + 0.2, (146, 98, 72), 0.7)
    x = 38 + 20 * r[2] if r[3] < 0.5 else 262 + 20 * r[2]
    for limb in (
        rectangle(x - 8, 72, x + 8, 154),
        rectangle(x - 26, 92, x - 15, 122),
        rectangle(x - 26, 112, x, 122),
        rectangle(x + 15, 82, x + 26, 110),
        rectangle(x, 100, x + 26, 110),
    ):
        b.form(rounded(limb, 0.2), (92, 116, 78), traced=False)


def _under_water(b: _Backdrop, r: NDArray[np.float64]) -> None:
    b.gradient(0, 192, (44, 148, 164), (8, 58, 96))
    for ray in range(3):
        x = 40 + 100 * ray + 40 * r[0]
        b.form(
            np.array([(x - 8, -4), (x + 22, -4), (x - 14, 170), (x - 64, 170)]),
            mix((44, 148, 164), (18, 86, 116), 0.35 + 0.1 * ray) + 4,
            traced=False,
        )
    b.canvas[:] = cv2.GaussianBlur(b.canvas, (0, 0), b.canvas.shape[0] / 48)
    b.hill(162, 6, r[1], (70, 112, 108), 1.2)
    for x, tall in ((20 + 16 * r[2], 86), (48 + 16 * r[2], 54), (300 - 16 * r[3], 74), (272 - 16 * r[3], 44)):
        y = np.linspace(0, 1, 16)
        sway = 7 * np.sin(y * 6.5 + x)
        half = 6 * (1 - y) + 1.5
        left, right = (
            np.stack([x + sway - half, 172 - tall * y], 1),
            np.stack([x + sway + half, 172 - tall * y], 1),
        )
        b.form(np.concatenate([left, right[::-1]]), (30, 112, 92))
    for across, down, size in ((78, 44, 6), (92, 24, 4), (238, 60, 5), (250, 34, 7)):
        b.form(ellipse(across + 20 * r[2], down, size, size), (120, 188, 196))


_PAINTERS = {
    "dark room": _dark_room,
    "theatre": _theatre,
    "beach": _beach,
    "park": _park,
    "city at night": _city,
    "snow field": _snow,
    "desert": _desert,
    "under water": _under_water,
}
PLACES = tuple(_PAINTERS)


@lru_cache(maxsize=32)
def backdrop(
    place: str, style: str, layout_seed: int, width: int, height: int
) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    """RGB float32 (H, W, 3) in whole numbers, and what share of a mover shows at each pixel (None: all of it)."""
    layout = np.random.Generator(np.random.Philox(np.random.SeedSequence((layout_seed, 2))))
    canvas = _Backdrop(style, width, height)
    _PAINTERS[place](canvas, layout.random(4))
    picture, showing = canvas.finish()
    picture = np.rint(picture)
    picture.flags.writeable = False
    return picture, showing
