"""An engine that is told its masks: every part of region caching runs and costs what it costs, but what it says does
not count.

For figures at a given share of tiles, and for those of a mask that misses nothing. Knows no figures.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from pipeline.chunk import Controls
from pipeline.engine import Engine
from pipeline.plan import SETTLE, Plan
from pipeline.state import StreamState


@dataclass
class GivenPlan(Plan):
    """given_HW: the tiles to compute, to which come those that are too old; None: all."""

    given_HW: np.ndarray | None = None

    def take_given(self) -> None:
        self._take(self.given_HW)

    def see(self, estimate_TCHW: Tensor) -> None:
        super().see(estimate_TCHW)
        self.take_given()

    def spreads(self, clean_BTCHW: Tensor) -> bool:
        """Looks, but never runs passes again."""
        super().spreads(clean_BTCHW)
        self.take_given()
        return False


class GivenEngine(Engine):
    """The weights of another engine. given_HW: the mask of coming chunks, as in `GivenPlan`.

    A stream's first chunks stay dense, and so do those without regions; a painted mask goes before.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine.config, engine.codec, engine.text, engine.student, device=str(engine.device))
        self.given_HW: np.ndarray | None = None

    def _plan(
        self, state: StreamState, controls: Controls, sigmas: list[float], frames_TCHW: Tensor | None
    ) -> Plan | None:
        plan = super()._plan(state, controls, sigmas, frames_TCHW)
        if plan is None or controls.paint or plan.regions.since < SETTLE:
            return plan
        given = GivenPlan(plan.regions, plan.dial, plan.sourced, plan.probing, asked=plan.asked, given_HW=self.given_HW)
        if not given.probing:  # else the first pass comes before the mask
            given.take_given()
        return given
