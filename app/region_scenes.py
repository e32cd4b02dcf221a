"""What the figures of region caching are taken of: texts, and drawn scenes, functions of a seed and a picture's number.

Knows which pictures are true: the same scene comes with and without what a sensor adds. Knows no engine.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

FOLLOWED = "a room with an audience"  # what a stream is told to draw of a scene
TEXTS = (
    "an orange robot sways on a stage in front of an audience",
    "a blue fish moves left under water, neon style",
    "a green flower stands still in the park, pencil sketch",
)
PICTURES = 8  # of a chunk
CHUNK_S = 0.5
REST_S = 20.0  # of the visitor


@dataclass(frozen=True)
class Scene:
    """draw: a picture's number -> (H, W, 3) float, 0 to 255. noise: deviation of the sensor's.

    chunks: its own length; None: as many as are asked for. parts: stretches of chunks that are told by themselves too.
    """

    draw: Callable[[int], np.ndarray]
    noise: float = 2.0
    chunks: int | None = None
    parts: dict[str, range] = field(default_factory=dict)


def scenes(width: int, height: int, seed: int = 0) -> dict[str, Scene]:
    """By name."""
    rng = np.random.default_rng(seed)
    room = np.kron(rng.integers(50, 190, (height // 16, width // 16, 3)), np.ones((16, 16, 1))).astype(np.float64)
    other = np.kron(rng.integers(50, 190, (height // 16, width // 16, 3)), np.ones((16, 16, 1))).astype(np.float64)
    y, x = np.mgrid[:height, :width]
    leaves = 7 + round(REST_S / CHUNK_S)

    def disc(picture: np.ndarray, centre_y: float, centre_x: float, radius: float, colour: object) -> None:
        picture[(y - centre_y) ** 2 + (x - centre_x) ** 2 < radius**2] = colour

    def speaker(number: int) -> np.ndarray:
        picture, sway = room.copy(), 6 * np.sin(number / 5)
        picture[height // 2 :, :] *= 0.6  # the audience
        disc(picture, height * 0.42, width * 0.5 + sway, height * 0.12, (220, 170, 140))
        disc(picture, height * 0.42 + 2, width * 0.5 + sway, height * 0.03 * (1 + np.sin(number)), (90, 20, 20))
        return picture

    def clock(number: int) -> np.ndarray:
        picture, angle = room.copy(), number / 400
        for step in np.linspace(0, height * 0.22, 60):
            disc(picture, height / 2 - step * np.cos(angle), width / 2 + step * np.sin(angle), 2.5, (250, 250, 250))
        return picture

    def light(number: int) -> np.ndarray:
        return room * (1.35 if number >= 8 * PICTURES else 1.0)

    def exposure(number: int) -> np.ndarray:
        return speaker(number) * (1 + 0.12 * np.sin(number / 40))

    def pan(number: int) -> np.ndarray:
        return np.roll(room, 2 * number, 1)

    def cut(number: int) -> np.ndarray:
        return other if number >= 8 * PICTURES else room

    def visitor(number: int) -> np.ndarray:
        """In from the left, still for a while, and out again."""
        picture, at = room.copy(), number / PICTURES
        place = np.interp(at, (4, 7, leaves, leaves + 3), (-0.2, 0.5, 0.5, 1.2)) * width
        disc(picture, height * 0.5, place, height * 0.15, (230, 60, 60))
        return picture

    def rain(number: int) -> np.ndarray:
        picture, drops = room.copy(), np.random.default_rng(seed + 7)
        fall = (drops.integers(0, height, 220) + 9 * number) % height
        for top, column in zip(fall, drops.integers(0, width, 220), strict=True):
            picture[top : top + 10, column : column + 2] = 235
        return picture

    stay = {"resting": range(8, leaves), "leaving": range(leaves, leaves + 6)}  # the last: until it has been gone
    return {
        "speaker": Scene(speaker),
        "clock": Scene(clock, noise=1.0),
        "light": Scene(light),
        "noise_2": Scene(lambda number: room),
        "noise_5": Scene(lambda number: room, noise=5.0),
        "noise_10": Scene(lambda number: room, noise=10.0),
        "exposure": Scene(exposure),
        "pan": Scene(pan),
        "cut": Scene(cut),
        "visitor": Scene(visitor, chunks=leaves + 6, parts=stay),
        "rain": Scene(rain),
    }


def shoot(scene: Scene, chunk: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A chunk as it is, and as a camera sees it: (T, H, W, 3) uint8 each."""
    true = np.stack([scene.draw(PICTURES * chunk + number) for number in range(PICTURES)])
    seen = true + np.random.default_rng([seed, chunk]).normal(0, scene.noise, true.shape)
    return np.clip(true, 0, 255).astype(np.uint8), np.clip(seen.round(), 0, 255).astype(np.uint8)
