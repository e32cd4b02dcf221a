"""Figures of region caching, from pictures and masks alone: uint8 (T, H, W, 3), boolean (H, W).

Each is a small pure function. Knows no engine and no clock.
"""

import cv2
import numpy as np

CHANGED = 8  # of 255: a difference that a person could see
CHANGED_PIXELS = 12  # of a tile
BEYOND = 2.5  # a draw held against three others passes this in 1 to 9 of 100 tiles, by the scene
PREWITT = np.array([[1.0, 0.0, -1.0]] * 3) / 3
GMSD_CALM = 170.0  # gradients below its root count as alike


def over_pixels(mask_HW: np.ndarray, tile: int = 32) -> np.ndarray:
    pixels: np.ndarray = np.kron(mask_HW, np.ones((tile, tile), bool))
    return pixels


def inside(area_HW: np.ndarray, margin: int = 8) -> np.ndarray:
    """The area without a margin along its border."""
    side = 2 * margin + 1
    kept: np.ndarray = cv2.erode(area_HW.astype(np.uint8), np.ones((side, side), np.uint8)) > 0
    return kept


def rms(one: np.ndarray, other: np.ndarray, area_HW: np.ndarray) -> float | None:
    if not area_HW.any():
        return None
    difference = one[:, area_HW].astype(np.float64) - other[:, area_HW]
    return float(np.sqrt((difference**2).mean()))


def psnr(one: np.ndarray, other: np.ndarray, area_HW: np.ndarray) -> float | None:
    """Decibels, at most 60."""
    error = rms(one, other, area_HW)
    return None if error is None else 60.0 if error < 0.255 else float(20 * np.log10(255 / error))


def ssim(one: np.ndarray, other: np.ndarray, area_HW: np.ndarray) -> float | None:
    """Structural similarity of the grey pictures (Wang et al. 2004, a Gaussian window of 1.5), over an area."""
    if not area_HW.any():
        return None

    def smooth(picture: np.ndarray) -> np.ndarray:
        blurred: np.ndarray = cv2.GaussianBlur(picture, (11, 11), 1.5)
        return blurred

    values = []
    for a_HWC, b_HWC in zip(one, other, strict=True):
        a, b = a_HWC.mean(-1, dtype=np.float64), b_HWC.mean(-1, dtype=np.float64)
        mean_a, mean_b = smooth(a), smooth(b)
        var_a, var_b, both = smooth(a * a) - mean_a**2, smooth(b * b) - mean_b**2, smooth(a * b) - mean_a * mean_b
        c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        similar = (2 * mean_a * mean_b + c1) * (2 * both + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
        values.append(similar[area_HW].mean())
    return float(np.mean(values))


def gmsd(one: np.ndarray, other: np.ndarray, area_HW: np.ndarray) -> float | None:
    """Gradient magnitude similarity deviation (Xue et al. 2014) of the grey pictures over an area; 0 is equal."""
    if not area_HW.any():
        return None

    def slope(picture_HWC: np.ndarray) -> np.ndarray:
        grey = cv2.blur(picture_HWC.mean(-1, dtype=np.float64), (2, 2))[::2, ::2]
        across, down = (cv2.filter2D(grey, -1, kernel) for kernel in (PREWITT, PREWITT.T))
        steep: np.ndarray = np.hypot(across, down)
        return steep

    small, values = area_HW[::2, ::2], []
    for a_HWC, b_HWC in zip(one, other, strict=True):
        a, b = slope(a_HWC), slope(b_HWC)
        similar = (2 * a * b + GMSD_CALM) / (a * a + b * b + GMSD_CALM)
        values.append(similar[small].std())
    return float(np.mean(values))


def ratio(ours: float | None, theirs: float | None) -> float | None:
    return None if ours is None or not theirs else ours / theirs


def seam(frames: np.ndarray, mask_HW: np.ndarray, tile: int = 32) -> float | None:
    """Mean step from pixel to pixel across the mask's border, over that across the lines beside it."""
    values = frames.astype(np.float64)
    at, beside = [], []
    for axis, (rows, columns) in ((0, (1, 0)), (1, (0, 1))):
        border = np.diff(mask_HW, axis=axis)
        for place_y, place_x in zip(*np.nonzero(border), strict=True):
            y, x = (place_y + rows) * tile, (place_x + columns) * tile
            lines = slice(x, x + tile) if axis == 0 else slice(y, y + tile)
            cut = y if axis == 0 else x
            band = values[:, cut - 4 : cut + 4, lines] if axis == 0 else values[:, lines, cut - 4 : cut + 4]
            steps = np.abs(np.diff(band, axis=1 if axis == 0 else 2)).mean((0, 2, 3) if axis == 0 else (0, 1, 3))
            at.append(steps[3])
            beside.append(np.delete(steps, 3).mean())
    return ratio(float(np.mean(at)), float(np.mean(beside))) if at else None


def pop(before_HWC: np.ndarray, frames: np.ndarray, area_HW: np.ndarray) -> float | None:
    """Mean step into a chunk, over an area."""
    if not area_HW.any():
        return None
    return float(np.abs(frames[0, area_HW].astype(np.float64) - before_HWC[area_HW]).mean())


def ghost(
    ours: np.ndarray, dense: np.ndarray, again: np.ndarray, before_HWC: np.ndarray, area_HW: np.ndarray
) -> float | None:
    """Of what was shown before and a dense chunk shows no more, the share that our last picture still shows.

    0: nothing; 1: all of it; below 0: less than the dense chunk. Of the area, the pixels in which a person could see
    that something left. again: the dense chunk with other noise, which says what left: else the noise of `dense`, on
    both sides, would look like a ghost.
    """
    gone = before_HWC.astype(np.float64) - again[-1]
    area_HW = area_HW & (np.abs(gone).max(-1) > CHANGED)
    if not area_HW.any():
        return None
    left = ours[-1, area_HW].astype(np.float64) - dense[-1, area_HW]
    return float((left * gone[area_HW]).sum() / (gone[area_HW] ** 2).sum())


def flow_energy(frames: np.ndarray, area_HW: np.ndarray) -> float | None:
    """Mean square step from picture to picture, over an area."""
    return float((np.diff(frames[:, area_HW].astype(np.float64), axis=0) ** 2).mean()) if area_HW.any() else None


def true_change(frames: np.ndarray, stood_on_HWC: np.ndarray, tile: int = 32) -> np.ndarray:
    """Tiles in which a person could see that some picture differs from the one that the tile stands on."""
    differs = np.abs(frames.astype(np.int16) - stood_on_HWC).max(-1) > CHANGED
    count, height, width = differs.shape
    tiles = differs.reshape(count, height // tile, tile, width // tile, tile).sum((2, 4))
    changed: np.ndarray = (tiles >= CHANGED_PIXELS).any(0)
    return changed


def true_motion(draws: list[np.ndarray], held_THWC: np.ndarray, tile: int = 32) -> np.ndarray:
    """Tiles that moved, as told by several draws of one chunk from one state, and not just drawn afresh.

    What is held must differ from the draws' mean by what a person could see, in CHANGED_PIXELS of a tile, and by
    BEYOND times as much as the draws differ from each other there. held_THWC: the pictures of one latent frame, each of
    which is compared with those in its place: a decoder draws them a little differently even where all stands still.
    """
    assert len(draws) > 1, "one draw does not say what is chance"
    values = np.stack(draws).astype(np.float32)
    total, others = values.sum(0), len(draws) - 1
    means = [(total - one) / others for one in values]

    def tail(one: np.ndarray, mean_THWC: np.ndarray) -> np.ndarray:
        """By picture and tile, the difference that CHANGED_PIXELS of its pixels reach."""
        differs = np.abs(one - mean_THWC).max(-1)
        count, height, width = differs.shape
        cells = differs.reshape(count, height // tile, tile, width // tile, tile).transpose(0, 1, 3, 2, 4)
        reached: np.ndarray = np.partition(cells.reshape(*cells.shape[:3], -1), -CHANGED_PIXELS)[..., -CHANGED_PIXELS]
        return reached

    chance = np.mean([tail(one, mean_THWC) for one, mean_THWC in zip(values, means, strict=True)], (0, 1))
    held_THWC = np.tile(held_THWC, (len(total) // len(held_THWC), 1, 1, 1))
    change = np.mean([tail(held_THWC, mean_THWC) for mean_THWC in means], 0)
    moved: np.ndarray = (change > np.maximum(CHANGED, BEYOND * chance)).any(0)
    return moved


def recall_and_precision(pairs: list[tuple[np.ndarray, np.ndarray]]) -> tuple[float | None, float | None]:
    """Over (true, said) masks; None where there was nothing to find, or nothing said."""
    both = sum(int((true & said).sum()) for true, said in pairs)
    true, said = (sum(int(pair[place].sum()) for pair in pairs) for place in (0, 1))
    return (both / true if true else None), (both / said if said else None)


def mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
