"""LPIPS (Zhang et al. 2018), where a package for it and its backbone's weights are on this disk; else there is none.

Downloads nothing: torch's own hub folder is looked into (`TORCH_HOME` moves it). Knows no engine.
"""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

BACKBONE = "alexnet-owt-7be5be79.pth"
PACKAGES = ("lpips", "torchmetrics.image.lpip")  # both bring the weights that they put on the backbone
LEAST = 64  # pixels each way, below which the backbone has nothing left to see

Distance = Callable[[Tensor, Tensor], Tensor]  # of pictures (T, 3, H, W) from -1 to 1


def find_lpips() -> Distance | None:
    if not (Path(torch.hub.get_dir()) / "checkpoints" / BACKBONE).is_file():
        return None
    for package in PACKAGES:
        try:
            module: Any = import_module(package)
            named = package == "lpips"
            made = module.LPIPS(net="alex", verbose=False) if named else module.LearnedPerceptualImagePatchSimilarity()
        except ImportError:  # or that of torchvision, which has the backbone's shape
            continue
        distance: Distance = made.eval()
        return distance
    return None


@torch.inference_mode()
def perceived(
    distance: Distance | None, one_THWC: np.ndarray, other_THWC: np.ndarray, area_HW: np.ndarray
) -> float | None:
    """Distance of two clips over an area: outside of it both show the other one, and only its surroundings are cut."""
    if distance is None or not area_HW.any():
        return None
    rows, columns = (_reach(np.flatnonzero(area_HW.any(axis)), area_HW.shape[1 - axis]) for axis in (1, 0))
    pasted = np.where(area_HW[..., None], one_THWC, other_THWC)
    ours, theirs = (
        torch.from_numpy(np.ascontiguousarray(each[:, rows, columns])).permute(0, 3, 1, 2) / 127.5 - 1
        for each in (pasted, other_THWC)
    )
    return float(distance(ours, theirs).mean())


def _reach(chosen: np.ndarray, size: int) -> slice:
    """From the first to the last, at least LEAST where there is as much."""
    start = max(0, min(int(chosen[0]), size - LEAST))
    return slice(start, max(int(chosen[-1]) + 1, start + LEAST))
