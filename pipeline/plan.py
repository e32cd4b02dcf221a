"""One chunk's plan: which tiles are computed, which are held. Dense whenever holding would be wrong or would not pay.

Dense: at first and after anything but the picture changed (prompt, schedule, another source or none), where the motion
mask says that nothing stands (light, camera, cut), and above the break-even. Otherwise the mask, the tiles that are too
old, and, as far as the next size of column goes, the oldest ones. A painted mask is taken as it is; all painted is
dense.
Knows nothing of passes and codecs.
"""

from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from pipeline.motion import Sensitivity, within_reach
from pipeline.region_cache import RegionCache
from pipeline.tiles import Tiles

BREAK_EVEN = 0.7  # share of tiles above which a dense chunk is as fast
PROBED_BREAK_EVEN = 0.5  # the same where the first pass is dense
AGAIN = 0.3  # share of tiles up to which passes are worth running again
SIZES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7)  # of columns: few, so that shapes are static
SETTLE = 3  # dense chunks before anything is held: the window then holds what the new prompt drew
OLDEST = (24, 96)  # chunks that a tile may be held, at the dial's ends


@dataclass
class Plan:
    """mask_HW: tiles to compute, None: all. refreshed_HW: those of them that are computed for their age alone.

    sourced, probing: what the mask is made from, the source's pictures or the first pass; neither: it was painted.
    anew: what is painted is to show another prompt, so that its past would only hold it back. asked: the schedule that
    is asked for, by which carried keys know their passes; the one that is run may begin lower.
    """

    regions: RegionCache
    dial: float
    sourced: bool = False
    probing: bool = False
    mask_HW: np.ndarray | None = None
    refreshed_HW: np.ndarray | None = None
    tiles: Tiles | None = None
    checked: bool = False
    anew: bool = False
    asked: tuple[float, ...] = ()
    sensitivity: Sensitivity = field(init=False)

    def __post_init__(self) -> None:
        self.sensitivity = Sensitivity.of(self.dial)

    @classmethod
    def begin(
        cls, regions: RegionCache, dial: float, paint: str, key: tuple[object, ...], frames_TCHW: Tensor | None
    ) -> "Plan":
        """key: all that held values stand on besides their place. frames_TCHW: the source's pictures, -1 to 1."""
        anew = bool(paint) and regions.ready and regions.key[:1] != key[:1]
        regions.since = regions.since + 1 if regions.ready and key == regions.key else 0
        regions.key = key
        sourced = frames_TCHW is not None
        plan = cls(regions, dial or 0.5, sourced, not sourced and not paint)
        settled = regions.since >= SETTLE
        if frames_TCHW is not None:
            seen = regions.source.look(frames_TCHW, regions.per_latent, settled, plan.sensitivity)
            if not paint:
                plan._take(seen)
        if "0" in paint and regions.ready:  # all painted: a dense chunk
            painted = np.array([cell == "1" for cell in paint]).reshape(regions.age_HW.shape)
            plan._set(painted, np.zeros_like(painted))
            plan.anew = anew
        return plan

    def see(self, estimate_TCHW: Tensor) -> None:
        """The first pass is done: what it drew says which tiles go on."""
        settled = self.regions.since >= SETTLE
        self._take(self.regions.probe.look(estimate_TCHW, settled, self.sensitivity))

    def spreads(self, clean_BTCHW: Tensor) -> bool:
        """Whether what moves has reached the mask's border: then the passes run again, once, with its neighbours.

        Where that would cost too much, the neighbours' turn comes with the next chunk.
        """
        if not self.probing or self.checked or self.mask_HW is None:
            return False
        self.checked = True
        reached = self._around(self.changed(clean_BTCHW)) & ~self.mask_HW
        wide = self.mask_HW | reached
        if not reached.any() or wide.mean() > AGAIN:
            return False
        self._take(wide)
        return True

    def changed(self, clean_BTCHW: Tensor) -> Tensor:
        """How far each cell's latents are from those that were held, (h, w); 0 where they still are."""
        held, whole = self.regions.latent_BCHW[0], clean_BTCHW[0]
        if self.tiles is not None:
            whole = held.expand(len(whole), -1, -1, -1).clone()
            self.tiles.scatter(clean_BTCHW[0], whole)
        return (whole - held).square().mean(1).sqrt().amax(0)

    def keep(self, clean_BTCHW: Tensor) -> tuple[Tensor, Tiles | None]:
        """The chunk is drawn. Returns its whole latents and the tiles whose pictures change.

        Those are more than the computed ones where these changed much: a decoder lets a cell shine into its neighbours.
        """
        changed_HW, drawn = self.changed(clean_BTCHW), None
        if self.probing:
            self.regions.probe.keep(changed_HW, self.mask_HW, self.sensitivity)
        if self.sourced:
            self.regions.source.keep(self.mask_HW)
        if self.mask_HW is not None:
            reached = self._around(changed_HW)
            drawn = Tiles.of(self.mask_HW | reached, clean_BTCHW.device)
            if self.probing:
                self.regions.probe.moving_HW |= reached & ~self.mask_HW
        return self.regions.keep(clean_BTCHW, self.tiles), drawn

    def _around(self, changed_HW: Tensor) -> np.ndarray:
        return within_reach(changed_HW, self.sensitivity.drift, self.regions.probe.moving_HW.shape)

    def _take(self, mask_HW: np.ndarray | None) -> None:
        """Settle on a mask, or on all tiles."""
        youngest, oldest = OLDEST
        limit = youngest + self.dial * (oldest - youngest)
        most = PROBED_BREAK_EVEN if self.probing else BREAK_EVEN
        full = None if mask_HW is None else filled(mask_HW, self.regions.age_HW, limit, most)
        if mask_HW is None or full is None:
            self.mask_HW = self.refreshed_HW = self.tiles = None
        else:
            self._set(full, full & ~mask_HW)

    def _set(self, mask_HW: np.ndarray, refreshed_HW: np.ndarray) -> None:
        self.mask_HW, self.refreshed_HW = mask_HW, refreshed_HW
        self.tiles = Tiles.of(mask_HW, self.regions.latent_BCHW.device)


def filled(mask_HW: np.ndarray, age_HW: np.ndarray, limit: float, most: float = BREAK_EVEN) -> np.ndarray | None:
    """The mask with all that is too old, filled up to the next size with the oldest; None: dense is as fast."""
    full: np.ndarray = mask_HW | (age_HW >= limit)
    total, count = full.size, int(full.sum())
    size = next((size for share in SIZES if (size := max(1, round(share * total))) >= count), None)
    if count > most * total or size is None:
        return None
    by_age = np.argsort(np.where(full, -1, age_HW).flat, kind="stable")[::-1]
    full = full.copy()
    full.flat[by_age[: size - count]] = True
    return full
