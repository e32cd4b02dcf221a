"""Contact sheets: rows of pictures in one PNG, because looking beats reading."""

from pathlib import Path

import cv2
import numpy as np


def write_sheet(path: Path, rows: list[list[np.ndarray]]) -> None:
    """rows: uint8 RGB pictures of one size."""
    sheet = np.concatenate([np.concatenate(row, axis=1) for row in rows], axis=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR)):
        raise OSError(f"could not write {path}")
