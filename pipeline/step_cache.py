"""Step caching: passes of one chunk that would hardly differ from the one before are not computed.

TeaCache's rule: what a pass is told (its tokens, normed and modulated for the first layer) is compared with what the
pass before was told; the relative changes add up, and until they reach a threshold, the layers are left out and what
they last added to the tokens is added again. First and last pass are always computed. It pays where many passes are
alike: at 50, hardly at 8, and not at 4, each of which changes most of the picture.

The cache hooks of diffusers wrap the forward of its own blocks, which an explicit loop over layers never calls. Knows
nothing of prompts and the past; the cache pass, which writes keys, must not go through it.
Source: TeaCache (Liu et al. 2024), without its fitted polynomial, which belongs to one model.
"""

from torch import Tensor

from pipeline.attention import Attend
from pipeline.student import Student, TextKV, modulated


class StepCache:
    """A student's forward for the passes of one chunk. threshold: 0 leaves nothing out, and equals it bit for bit."""

    def __init__(self, student: Student, threshold: float, passes: int) -> None:
        self.student, self.threshold, self.passes = student, threshold, passes
        self.step = self.skipped = 0
        self._told: Tensor | None = None
        self._added: Tensor | None = None
        self._change = 0.0

    def __call__(
        self,
        latents_BTCHW: Tensor,
        timesteps_BT: Tensor,
        text: TextKV,
        attend: Attend,
        control_BTCHW: Tensor | None = None,
        ends_BT: Tensor | None = None,
    ) -> Tensor:
        student = self.student
        before = student.embed(latents_BTCHW, control_BTCHW)
        modulation, head_modulation = student.time(timesteps_BT, ends_BT)
        if self._skips(before, modulation):
            assert self._added is not None, "the first pass is computed"
            tokens = before + self._added
            self.skipped += 1
        else:
            tokens = before
            for layer in range(len(student.model.blocks)):
                tokens = student.layer(layer, tokens, modulation, text, attend)
            self._added, self._change = tokens - before, 0.0
        self.step += 1
        return student.head(tokens, head_modulation, latents_BTCHW)

    def _skips(self, tokens_BND: Tensor, modulation: Tensor) -> bool:
        if not self.threshold:
            return False
        block = self.student.model.blocks[0]
        shift, scale = (block.scale_shift_table + modulation).unbind(2)[:2]
        told, last = modulated(block.norm1, tokens_BND, scale, shift), self._told
        self._told = told
        if last is None or self.step == self.passes - 1:
            return False
        self._change += float((told - last).abs().mean() / last.abs().mean())
        return self._change < self.threshold
