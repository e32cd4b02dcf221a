"""Pictures of the movers: eight subjects with faces, in eight colours and four styles, as small RGBA sprites.

It also holds the brush and the style rules that places use. It knows nothing of positions, motion or time.
"""

from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

Points = NDArray[np.float64]
Colour = NDArray[np.float64]

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (230, 30, 38),
    "orange": (255, 132, 14),
    "yellow": (255, 216, 26),
    "green": (34, 190, 66),
    "blue": (36, 92, 246),
    "purple": (146, 52, 220),
    "pink": (255, 112, 186),
    "white": (248, 248, 252),
}
STYLES = ("flat", "pastel", "neon", "pencil sketch")
PAPER = np.array((232.0, 226.0, 212.0))
GRAPHITE = np.array((74.0, 70.0, 70.0))
WHITE = np.array((255.0, 255.0, 255.0))
_SUPERSAMPLE = 3
_MARGIN = 1.32  # half side of a sprite in radii: leaves room for the glow


def mix(a: ArrayLike, b: ArrayLike, amount: float) -> Colour:
    """From `a` (amount 0) to `b` (amount 1)."""
    mixed: Colour = np.asarray(a, float) * (1 - amount) + np.asarray(b, float) * amount
    return mixed


def wash(style: str, rgb: ArrayLike) -> Colour:
    """A backdrop colour as the style shows it: always calmer than a mover, so that the mover stands out."""
    colour: Colour = np.asarray(rgb, float)
    grey = colour.mean(axis=-1, keepdims=True)
    if style == "pastel":
        cool = np.array((0, -1, 14)) * (1 - grey / 255) ** 2  # darkness turns cool, not muddy
        colour = 138 + cool + 0.44 * grey + 0.8 * (colour - grey)
    if style == "neon":
        colour = np.array((6, 0, 16)) + 0.17 * grey + 0.5 * (colour - grey)
    if style == "pencil sketch":
        colour = PAPER * 0.66 + 0.32 * grey + 0.5 * (colour - grey)
    return np.asarray(np.clip(colour, 0, 255))


def trace_colour(style: str, rgb: ArrayLike) -> Colour | None:
    """The line that the style draws around a backdrop's form, if any."""
    colour = np.asarray(rgb, float)
    if style == "neon":
        bright: Colour = colour - 0.75 * colour.min()
        bright *= 150 / max(float(bright.max()), 1.0)
        return bright
    return mix(GRAPHITE, PAPER, 0.2) if style == "pencil sketch" else None


class Brush:
    """Antialiased filled forms and lines, in logical units, on a uint8 canvas of 3 or 4 channels.

    On a canvas that starts at zero with 4 channels the result is premultiplied RGBA.
    """

    def __init__(self, canvas: NDArray[np.uint8], scale: tuple[float, float], origin: float = 0.0) -> None:
        self.canvas, self.scale, self.origin = canvas, np.array(scale), origin

    def fill(self, points: ArrayLike, colour: ArrayLike) -> None:
        cv2.fillPoly(self.canvas, [self._fixed(points)], self._ink(colour), cv2.LINE_AA, 4)

    def line(self, points: ArrayLike, colour: ArrayLike, width: float, closed: bool = False) -> None:
        thickness = max(1, round(width * self.scale[1]))
        cv2.polylines(self.canvas, [self._fixed(points)], closed, self._ink(colour), thickness, cv2.LINE_AA, 4)

    def _fixed(self, points: ArrayLike) -> NDArray[np.int32]:
        scaled = (np.asarray(points, float) + self.origin) * self.scale
        return np.asarray(np.rint(scaled * 16), np.int32)

    @staticmethod
    def _ink(colour: ArrayLike) -> tuple[float, ...]:
        r, g, b = np.clip(np.asarray(colour, float), 0, 255)
        return (float(r), float(g), float(b), 255.0)


def ellipse(cx: float, cy: float, rx: float, ry: float, start: float = 0.0, stop: float = 1.0) -> Points:
    turns = np.linspace(start, stop, 49) * 2 * np.pi
    return np.stack([cx + rx * np.cos(turns), cy + ry * np.sin(turns)], axis=1)


def rectangle(left: float, top: float, right: float, bottom: float) -> Points:
    return np.array([(left, top), (right, top), (right, bottom), (left, bottom)], float)


def rounded(corners: ArrayLike, amount: float = 0.2) -> Points:
    """The polygon with each corner replaced by a curve that starts `amount` of the way along its sides."""
    here = np.asarray(corners, float)
    before, after = np.roll(here, 1, axis=0), np.roll(here, -1, axis=0)
    enter, leave = mix(here, before, amount), mix(here, after, amount)
    s = np.linspace(0, 1, 8)[None, :, None]
    curve = enter[:, None] * (1 - s) ** 2 + here[:, None] * 2 * s * (1 - s) + leave[:, None] * s**2
    return np.asarray(curve.reshape(-1, 2))


class _Figure:
    """Draws one subject's parts in the tones of a colour and a style."""

    def __init__(self, brush: Brush, colour: str, style: str) -> None:
        self.brush, self.style, self.colour = brush, style, colour
        rgb = np.array(PALETTE[colour], float)
        shade = (96, 100, 128) if colour == "white" else rgb * 0.42
        self.ink, self.glint = np.array((38.0, 26.0, 44.0)), WHITE
        if style == "pastel":
            rgb, self.edge, self.edge_width = mix(rgb, WHITE, 0.3), mix(rgb, (150, 120, 140), 0.4), 0.045
            self.light, self.dark = mix(rgb, WHITE, 0.45), mix(rgb, shade, 0.16)
            self.ink = np.array((92.0, 66.0, 92.0))
        elif style == "neon":
            self.edge, self.edge_width = mix(rgb, WHITE, 0.3), 0.09
            self.light, self.dark, self.ink = rgb * 0.92, rgb * 0.42, mix(rgb, WHITE, 0.85)
            rgb = rgb * 0.64
            self.glint = rgb
        elif style == "pencil sketch":
            self.edge, self.edge_width = GRAPHITE * 0.7, 0.075
            rgb = mix(rgb, PAPER, 0.16)
            self.light, self.dark, self.ink = mix(rgb, PAPER, 0.5), mix(rgb, GRAPHITE, 0.25), GRAPHITE * 0.6
        else:
            self.edge, self.edge_width = mix(rgb, shade, 0.75), 0.05
            self.light, self.dark = mix(rgb, WHITE, 0.45), mix(rgb, shade, 0.35)
        self.base = rgb

    def part(self, points: Points, tone: ArrayLike | None = None, edged: bool = True) -> None:
        self.brush.fill(points, self.base if tone is None else tone)
        if edged:
            self.brush.line(points, self.edge, self.edge_width, closed=True)

    def face(self, x: float, y: float, size: float = 1.0) -> None:
        for side in (-1, 1):
            eye = x + side * 0.25 * size
            self.brush.fill(ellipse(eye, y, 0.1 * size, 0.15 * size), self.ink)
            self.brush.fill(ellipse(eye + 0.03 * size, y - 0.06 * size, 0.04 * size, 0.05 * size), self.glint)
        smile = ellipse(x, y + 0.17 * size, 0.16 * size, 0.14 * size, 0.06, 0.44)
        self.brush.line(smile, self.ink, 0.055 * size)

    def leaf_tone(self) -> Colour:
        green = np.array((46.0, 132.0, 62.0))
        if self.style == "neon":
            return green * 1.3
        return mix(green, PAPER, 0.4) if self.style in ("pastel", "pencil sketch") else green

    def ball(self) -> None:
        self.part(ellipse(0, 0, 0.96, 0.96))
        self.brush.fill(ellipse(-0.4, -0.5, 0.26, 0.17), self.light)
        self.face(0.06, 0.0, 1.25)

    def box(self) -> None:
        self.part(np.array([(-0.92, -0.5), (-0.5, -0.92), (0.94, -0.92), (0.56, -0.5)]), self.light)
        self.part(np.array([(0.56, -0.5), (0.94, -0.92), (0.94, 0.5), (0.56, 0.92)]), self.dark)
        self.part(rectangle(-0.92, -0.5, 0.56, 0.92))
        self.face(-0.18, 0.12, 1.2)

    def triangle(self) -> None:
        self.part(rounded([(0, -1.08), (1.08, 0.88), (-1.08, 0.88)], 0.12))
        self.brush.line([(-0.14, -0.62), (-0.42, -0.12)], self.light, 0.13)
        self.face(0, 0.3, 1.15)

    def star(self) -> None:
        angles = np.arange(10) * np.pi / 5 - np.pi / 2
        radii = np.where(np.arange(10) % 2 == 0, 1.08, 0.56)
        self.part(rounded(np.stack([np.cos(angles) * radii, np.sin(angles) * radii + 0.05], 1), 0.22))
        self.brush.line([(-0.05, -0.68), (-0.17, -0.4)], self.light, 0.1)
        self.face(0, 0.02, 1.1)

    def heart(self) -> None:
        t = np.linspace(0, 2 * np.pi, 64, endpoint=False)
        y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        self.part(np.stack([np.sin(t) ** 3 * 1.02, -y / 16.5 - 0.12], axis=1))
        self.brush.fill(ellipse(-0.5, -0.5, 0.2, 0.13), self.light)
        self.face(0, -0.08, 1.2)

    def robot(self) -> None:
        for side in (-1, 1):
            self.part(rounded(rectangle(side * 0.36 - 0.16, 0.6, side * 0.36 + 0.16, 0.98), 0.2), self.dark)
            self.part(rounded(rectangle(side * 0.76 - 0.13, 0.02, side * 0.76 + 0.13, 0.56), 0.4), self.dark)
        self.brush.line([(0, -0.72), (0, -0.95)], self.edge, 0.07)
        self.part(ellipse(0, -0.98, 0.12, 0.12), self.light)
        self.part(rounded(rectangle(-0.6, -0.04, 0.6, 0.72), 0.16))
        self.part(rounded(rectangle(-0.72, -0.78, 0.72, 0.04), 0.2))
        self.part(rounded(rectangle(-0.54, -0.62, 0.54, -0.1), 0.25), self.light, edged=False)
        self.face(0, -0.4, 1.05)
        self.brush.fill(ellipse(0, 0.36, 0.16, 0.16), self.light)

    def fish(self) -> None:
        self.part(rounded([(-0.5, 0), (-1.14, -0.62), (-0.98, 0), (-1.14, 0.62)], 0.22), self.dark)
        self.part(rounded([(-0.35, -0.5), (0.0, -0.98), (0.42, -0.5)], 0.25), self.dark)
        self.part(ellipse(0.18, 0, 0.92, 0.68))
        self.brush.fill(ellipse(0.14, 0.34, 0.5, 0.19), self.light)
        self.part(rounded([(0.1, 0.02), (-0.36, -0.2), (-0.36, 0.28)], 0.3), self.dark)
        self.brush.fill(ellipse(0.64, -0.16, 0.18, 0.2), mix(self.light, WHITE, 0.6))
        self.brush.fill(ellipse(0.68, -0.15, 0.1, 0.13), (38, 26, 44))
        self.brush.line(ellipse(0.86, 0.12, 0.16, 0.12, 0.22, 0.5), self.ink, 0.055)

    def flower(self) -> None:
        self.brush.line([(0, 0.3), (0, 1.06)], self.leaf_tone(), 0.13)
        for side in (-1, 1):
            leaf = rounded([(0, 1.0), (side * 0.26, 0.66), (side * 0.66, 0.7), (side * 0.36, 0.98)], 0.3)
            self.part(leaf, self.leaf_tone(), edged=False)
        angles = np.arange(6) * np.pi / 3 + np.pi / 6
        for a in angles:
            self.part(ellipse(0.56 * np.cos(a), -0.28 + 0.56 * np.sin(a), 0.38, 0.38))
        centre = np.array((150.0, 84.0, 30.0)) if self.colour in ("yellow", "orange") else (255.0, 206.0, 70.0)
        dim = {"neon": 0.75}.get(self.style, 1.0)
        self.part(ellipse(0, -0.28, 0.42, 0.42), np.asarray(centre) * dim, edged=False)
        ink, self.ink = (
            self.ink,
            WHITE if self.colour in ("yellow", "orange") else np.array((56.0, 30.0, 30.0)),
        )
        self.face(0, -0.34, 0.85)
        self.ink = ink


_FIGURES = {
    name: getattr(_Figure, name) for name in ("ball", "box", "triangle", "star", "heart", "robot", "fish", "flower")
}
SUBJECTS = tuple(_FIGURES)


@lru_cache(maxsize=32)
def sprite(subject: str, colour: str, style: str, radius: float) -> NDArray[np.float32]:
    """Premultiplied RGB in [0, 255] with alpha in [0, 1], float32 (side, side, 4), centred; read-only.

    Light that only adds (the neon glow) has colour where alpha is low.
    """
    side = 2 * int(np.ceil(radius * _MARGIN)) + 1
    unit = radius * _SUPERSAMPLE
    large = np.zeros((side * _SUPERSAMPLE, side * _SUPERSAMPLE, 4), np.uint8)
    brush = Brush(large, (unit, unit), side / 2 / radius - 0.5 / unit)
    figure = _Figure(brush, colour, style)
    _FIGURES[subject](figure)
    small = np.asarray(cv2.resize(large, (side, side), interpolation=cv2.INTER_AREA), np.float32)
    small[..., 3] /= 255
    if style == "pastel":  # a soft light from above
        small[..., :3] *= np.linspace(1.06, 0.92, side, dtype=np.float32)[:, None, None]
    elif style == "pencil sketch":  # the crayon fades towards the upper left
        down = np.linspace(-1, 1, side, dtype=np.float32)
        fade = np.clip(-(down[:, None] + down[None, :]) * 0.5, 0, 0.45)[..., None]
        small[..., :3] += fade * (PAPER.astype(np.float32) * small[..., 3:] - small[..., :3])
    elif style == "neon":
        halo = np.asarray(cv2.GaussianBlur(small[..., 3], (0, 0), radius * 0.13))
        glow = np.array(PALETTE[colour], np.float32) * 0.62
        small[..., :3] += halo[..., None] * glow * (1 - small[..., 3:])
    np.clip(small[..., :3], 0, 255, out=small[..., :3])
    small.flags.writeable = False
    return small
