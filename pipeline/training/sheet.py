"""Contact sheets and small films: pictures to look at, because looking beats reading."""

from pathlib import Path

import cv2
import numpy as np
from PIL import Image


def write_sheet(path: Path, rows: list[list[np.ndarray]]) -> None:
    """rows: uint8 RGB pictures of one size."""
    sheet = np.concatenate([np.concatenate(row, axis=1) for row in rows], axis=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR)):
        raise OSError(f"could not write {path}")


def write_film(path: Path, clips: list[np.ndarray], fps: int) -> None:
    """An animated WebP that plays clips of one length above each other. clips: uint8 RGB (T, H, W, 3)."""
    pictures = [Image.fromarray(np.concatenate(frames, axis=0)) for frames in zip(*clips, strict=True)]
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=round(1000 / fps), loop=0, quality=70)
