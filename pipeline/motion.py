"""Which tiles to recompute: one boolean grid per chunk, true where a tile's held value no longer stands.

A tile is compared with what its held value was made from, never with the picture before: slow change adds up until it
is seen, and whoever left a tile differs from it. Two things can be compared: the pictures of a source, which are known
before anything is computed, and the first denoise pass's estimate of the chunk, the probe. `None` means that there is
nothing to hold: all changed, or all that has texture moved. Knows nothing of ages, buckets and keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.config import TILE_PIXELS

BLOCK = 4  # pixels: what is compared are means over blocks, which sensor noise hardly moves
BLOCKS = TILE_PIXELS // BLOCK
GAIN_LIMIT = 0.1  # brightness may drift so far since all was computed before all is computed again
SEEN_LIGHT = 0.057  # of 2: a change by light alone that a person nearly sees; then a tile follows
NOISE_LIMIT = 0.03  # of 2: more than this is motion, whatever else it looks like
TEXTURE = 0.03  # deviation within a tile that shows motion at all
MOVED_SHARE = 0.6  # of the textured tiles: the camera moves
REACH = 16  # pixels around a latent's change that its pictures are seen to change in, and a mover comes within a chunk
WILD = 3  # times what counts as a latent's change: so much reaches around it


@dataclass(frozen=True)
class Sensitivity:
    """What one dial, 0 < dial <= 1 (quality to speed), means.

    noises: how many deviations of noise a change must exceed, and floor: how much in any case (pictures from -1 to 1).
    drift: change of a latent that counts, in its unit deviation.
    """

    noises: float
    floor: float
    drift: float

    @classmethod
    def of(cls, dial: float) -> "Sensitivity":
        def between(low: float, high: float) -> float:
            return low + dial * (high - low)

        return cls(between(4.0, 6.0), between(0.02, 0.09), between(0.08, 0.20))


class SourceMotion:
    """Compares a source's pictures with those that held tiles were made from.

    Tiles are made at different times and in different light: the reference has all of them in the light in which all
    were last made, and light_HW says how much brighter than that it was when each was. moved_HW: blocks that moved,
    with those around them.
    """

    def __init__(self, device: torch.device | str, height: int, width: int) -> None:
        self.reference_CHW = torch.zeros(3, height // BLOCK, width // BLOCK, device=device)
        self.moving_HW = np.zeros((height // TILE_PIXELS, width // TILE_PIXELS), bool)
        self.light_HW = torch.ones(self.moving_HW.shape, device=device)
        self.moved_HW = self.reference_CHW.new_zeros(self.reference_CHW.shape[1:], dtype=torch.bool)
        self.noise: float | None = None
        self._newest_CHW, self._newest_light = self.reference_CHW.clone(), self.light_HW.new_ones(())

    def reset(self) -> None:
        self.moving_HW[:] = False
        self.light_HW.fill_(1)
        self.noise = None

    def look(self, frames_TCHW: Tensor, per_latent: int, held: bool, sensitivity: Sensitivity) -> np.ndarray | None:
        """The mask of a chunk of pictures from -1 to 1. held: whether there is anything to compare with."""
        blocks = block_means(frames_TCHW.float())
        self._newest_CHW.copy_(blocks[-per_latent:].mean(0))
        self._newest_light.fill_(1)
        self.moved_HW.zero_()
        self.noise = self._noise_of(blocks)
        if not held:
            return None
        gains = gains_of(blocks, self.reference_CHW)
        self._newest_light.copy_(gains[-per_latent:].mean())
        if float(gains.log().abs().max()) > GAIN_LIMIT:
            return None
        level = (blocks + 1) / gains[:, None, None, None] - 1
        changed = self._changed(level, per_latent, sensitivity)
        self.moving_HW, self.moved_HW = tiles_of(changed), F.max_pool2d(changed[None].float(), 3, 1, 1)[0] > 0
        if camera_moves(self.moving_HW, self.reference_CHW):
            return None
        mask = self.moving_HW | self._lit(gains)
        return None if mask.all() else mask

    def _lit(self, gains_T: Tensor) -> np.ndarray:
        """Tiles that light alone has changed: bright ones are seen to before dark ones are."""
        brightest_HW = F.max_pool2d(self.reference_CHW.amax(0)[None], BLOCKS)[0] + 1
        off_HW = (gains_T[:, None, None] - self.light_HW).abs().amax(0)
        lit: np.ndarray = (brightest_HW * off_HW > SEEN_LIGHT).cpu().numpy()
        return lit

    def keep(self, mask_HW: np.ndarray | None) -> None:
        """These tiles (None: all) are now made from the newest pictures."""
        if mask_HW is None:
            self.reference_CHW.copy_(self._newest_CHW)
            self.light_HW.fill_(1)
        else:
            device, made = self.reference_CHW.device, (self._newest_CHW + 1) / self._newest_light - 1
            torch.where(over_blocks(mask_HW, device), made, self.reference_CHW, out=self.reference_CHW)
            self.light_HW[torch.from_numpy(mask_HW).to(device)] = self._newest_light

    def _changed(self, level_TCHW: Tensor, per_latent: int, sensitivity: Sensitivity) -> Tensor:
        """Blocks that changed: clearly in one picture, or a little in all of them. Where it moved, less will do."""
        assert self.noise is not None, "noise is measured before it is used"
        difference = level_TCHW - self.reference_CHW
        ease = 1 - 0.4 * over_blocks(self.moving_HW, difference.device).float()
        sudden, steady = difference.abs().amax((0, 1)), difference.mean(0).abs().amax(0)
        limits = [
            ease
            * (sensitivity.floor * share + sensitivity.noises * self.noise * (1 / pictures + 1 / per_latent) ** 0.5)
            for pictures, share in ((1, 1.0), (len(level_TCHW), 0.5))
        ]
        return without_specks(sudden > limits[0]) | without_specks(steady > limits[1])

    def _noise_of(self, blocks_TCHW: Tensor) -> float:
        """Deviation of a block from picture to picture, by the median: what moves is not the half. Rises slowly."""
        step = blocks_TCHW[1:] - blocks_TCHW[:-1]
        around = F.avg_pool2d(step, 3)  # of every ninth block; more would cost what the rest of a look does
        rows, columns = around.shape[2:]
        fine = step[..., 1::3, 1::3][..., :rows, :columns] - around  # of what moves, this leaves the outlines
        # A slow camera repeats pictures: the pair that differs most tells.
        now = min(NOISE_LIMIT, 1.57 * float(fine.abs().flatten(1).median(1).values.max()) / 2**0.5)
        return now if self.noise is None else min(now, 1.1 * self.noise + 0.0005)


class ProbeMotion:
    """Compares the first pass's estimate of a chunk with the one that held tiles were last computed from."""

    def __init__(self, device: torch.device | str, size_CHW: tuple[int, int, int], tiles: tuple[int, int]) -> None:
        self.reference_CHW = torch.zeros(size_CHW, device=device)
        self.moving_HW = np.zeros(tiles, bool)
        self._newest_CHW = self.reference_CHW.clone()

    def reset(self) -> None:
        self.moving_HW[:] = False

    def look(self, estimate_TCHW: Tensor, held: bool, sensitivity: Sensitivity) -> np.ndarray | None:
        """The mask of a chunk of which the first pass drew this. What moved a chunk ago still does."""
        self._newest_CHW.copy_(estimate_TCHW[-1])
        if not held:
            return None
        tiles = self.moving_HW.shape
        change_TCHW = estimate_TCHW - self.reference_CHW
        change_HW = per_tile(change_TCHW, tiles).amax(0)
        calm = float(change_HW.flatten().quantile(0.2))  # how much the estimate of a still tile depends on its noise
        limit = min(max(sensitivity.drift, 2.5 * calm), 2.5 * sensitivity.drift)
        # A blurred estimate shows a mover's middle: its edge enters a tile in the chunk's last pictures.
        reached_HW = within_reach(change_TCHW.square().mean(1).sqrt().amax(0), limit, tiles)
        mask: np.ndarray = (change_HW.cpu().numpy() > limit) | reached_HW | self.moving_HW
        return mask

    def keep(self, changed_HW: Tensor, mask_HW: np.ndarray | None, sensitivity: Sensitivity) -> None:
        """These tiles (None: all) were computed. changed_HW: how far each cell now is from what it was."""
        moved = per_tile(changed_HW[None, None], self.moving_HW.shape)[0]
        self.moving_HW = moved.cpu().numpy() > 1.5 * sensitivity.drift
        if mask_HW is None:
            self.reference_CHW.copy_(self._newest_CHW)
        else:
            self.moving_HW &= mask_HW
            rows, columns = mask_HW.shape
            _, height, width = self.reference_CHW.shape
            chosen = torch.from_numpy(np.kron(mask_HW, np.ones((height // rows, width // columns), bool)))
            chosen = chosen.to(self.reference_CHW.device)
            torch.where(chosen, self._newest_CHW, self.reference_CHW, out=self.reference_CHW)


def block_means(frames_TCHW: Tensor) -> Tensor:
    """As `avg_pool2d` over BLOCK; rows first and without a reduction, which is several times faster where channels are
    last in memory."""
    rows = _summed(frames_TCHW.permute(0, 2, 3, 1).unflatten(1, (-1, BLOCK)).unbind(2))
    return _summed(rows.unflatten(2, (-1, BLOCK)).unbind(3)).div_(BLOCK**2).permute(0, 3, 1, 2).contiguous()


def _summed(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0] + parts[1]
    for part in parts[2:]:
        total += part
    return total


def gains_of(blocks_TCHW: Tensor, reference_CHW: Tensor) -> Tensor:
    """How much brighter each picture is than the reference: the median over tiles, which a mover does not sway."""
    lit = F.avg_pool2d(blocks_TCHW.mean(1), BLOCKS).flatten(1) + 1
    before = F.avg_pool2d(reference_CHW.mean(0)[None], BLOCKS).flatten() + 1
    return ((lit + 0.05) / (before + 0.05)).median(1).values


def camera_moves(moving_HW: np.ndarray, reference_CHW: Tensor) -> bool:
    """Most of what could show motion moves, and that is not just a corner of the picture."""
    grey = reference_CHW.mean(0)[None]
    mean = F.avg_pool2d(grey, BLOCKS)
    variance = F.avg_pool2d(grey.square(), BLOCKS) - mean.square()
    textured = (variance[0] > TEXTURE**2).cpu().numpy()
    share = moving_HW[textured].mean() if textured.any() else 0.0
    return bool(textured.mean() > 0.25 and share > MOVED_SHARE)


def without_specks(changed_HW: Tensor) -> Tensor:
    """A changed block counts with a changed neighbour."""
    around = F.avg_pool2d(changed_HW[None].float(), 3, 1, 1)[0] * 9
    return changed_HW & (around > 1.5)


def tiles_of(blocks_HW: Tensor) -> np.ndarray:
    """Tiles with any such block."""
    tiles: np.ndarray = (F.max_pool2d(blocks_HW[None].float(), BLOCKS)[0] > 0).cpu().numpy()
    return tiles


def over_blocks(mask_HW: np.ndarray, device: torch.device | str) -> Tensor:
    return torch.from_numpy(np.kron(mask_HW, np.ones((BLOCKS, BLOCKS), bool))).to(device)


def per_tile(x_TCHW: Tensor, tiles: tuple[int, int]) -> Tensor:
    """Root mean square of each tile, (T, rows, columns)."""
    return F.adaptive_avg_pool2d(x_TCHW.square().mean(1, keepdim=True), tiles)[:, 0].sqrt()


def within_reach(changed_HW: Tensor, limit: float, tiles: tuple[int, int]) -> np.ndarray:
    """Tiles within reach of a latent cell that changed much. changed_HW: how far each changed; limit: what counts."""
    rows, _ = tiles
    cells = len(changed_HW) // rows
    far = -(-REACH * cells // TILE_PIXELS)
    near = F.max_pool2d((changed_HW > WILD * limit).float()[None], 2 * far + 1, 1, far)
    mask: np.ndarray = (F.max_pool2d(near, cells)[0] > 0).cpu().numpy()
    return mask
