"""How much memory a model wants, reckoned from its row before anything is loaded. Arithmetic; measures nothing.

Weights and the past are exact. What a pass and the decoder need on top is an estimate, since it hangs on the kernels.
"""

from dataclasses import dataclass
from math import prod

from pipeline.config import StudentConfig
from pipeline.errors import PipelineError
from pipeline.models import BASES, Family, TextWeights

SCALE_BYTES = 4
"""Of a row of 8-bit weights."""
PROMPT_PLACES = 512
"""Of Wan's text encoder; every prompt is padded to it."""


def parameters(shape: StudentConfig) -> int:
    """Weights of a transformer, as diffusers builds it."""
    dim, patch = shape.num_attention_heads * shape.attention_head_dim, prod(shape.patch_size)
    attention = 4 * (dim * dim + dim) + 2 * dim
    layer = 2 * attention + 6 * dim + 2 * dim * shape.ffn_dim + shape.ffn_dim + dim + 2 * dim * shape.cross_attn_norm
    time = shape.freq_dim * dim + dim + dim * dim + dim + 6 * dim * dim + 6 * dim
    text = shape.text_dim * dim + dim + dim * dim + dim
    ends = (shape.in_channels * patch + 1) * dim + (dim + 1) * shape.out_channels * patch + 2 * dim
    return shape.num_layers * layer + time + text + ends


def text_bytes(text: TextWeights, bits: int) -> int:
    """A text encoder's room; bits: of its layers' weights, 16 or 8."""
    if bits == 16:
        return 2 * (text.tables + text.layers)
    return 2 * text.tables + text.layers + SCALE_BYTES * text.rows


@dataclass(frozen=True)
class Plan:
    """Bytes by what they are for, of one stream at one size."""

    title: str
    student: int
    past: int
    work: int
    """An estimate."""
    beside: int
    """Text encoder and codec."""

    @property
    def whole(self) -> int:
        """With everything on the device."""
        return self.student + self.past + self.work + self.beside

    @property
    def lean(self) -> int:
        """With the text encoder and the codec in the machine's memory instead."""
        return self.student + self.past + self.work

    def choose(self, free: int, host_free: int | None) -> str:
        """`whole` or `lean`: what fits. free: of the device; host_free: of the machine, unless that is the device.

        Raises PipelineError (`memory_short`).
        """
        if self.whole <= free:
            return "whole"
        if host_free is not None and self.lean <= free and self.beside <= host_free:
            return "lean"
        wants, has = f"{self.title} wants {amount(self.whole)}", f"{amount(free)} are free"
        if host_free is not None:
            wants += f", or {amount(self.lean)} with the {amount(self.beside)} of text encoder and codec in the machine"
            has += f" on the device and {amount(host_free)} in the machine"
        raise PipelineError(
            "memory_short",
            f"{wants}; {has}.",
            "Choose a smaller model or picture, --text-bits 8 with a model on Wan, or end what else is running.",
        )


def plan(row: Family, width: int, height: int, number_bytes: int = 2, text_bits: int = 16) -> Plan:
    """What one stream of a family wants at a size in pixels. number_bytes: 2 in bfloat16, 4 in single precision.

    text_bits: of the weights of Wan's text encoder, which has a precision of its own.

    Raises PipelineError (`size_invalid`).
    """
    base, shape = BASES[row.base], row.shape
    cell = base.stride * shape.patch_size[1]
    if width < cell or height < cell or width % cell or height % cell:
        raise PipelineError(
            "size_invalid",
            f"{width}x{height} does not divide into the {cell}x{cell} pixels of a token.",
            f"Choose multiples of {cell}, such as {max(1, width // cell) * cell}x{max(1, height // cell) * cell}.",
        )
    dim = shape.num_attention_heads * shape.attention_head_dim
    tokens = (width // cell) * (height // cell)
    frames = tokens * (row.sink + row.window)
    past = 2 * shape.num_layers * (frames + PROMPT_PLACES) * dim
    # A layer's widest moment: normed tokens, queries, keys of all it looks at, the hidden layer; then the decoder's
    # last stage, which is four pictures of 96 channels.
    layer = tokens * row.chunk * (shape.ffn_dim + 8 * dim) + 2 * tokens * row.attends * dim
    decoder = 3 * 96 * 4 * width * height
    return Plan(
        row.title,
        number_bytes * parameters(shape),
        number_bytes * past,
        number_bytes * max(layer, decoder),
        number_bytes * base.codec + text_bytes(base.text, text_bits),
    )


def amount(count: int) -> str:
    """Bytes, as people say them."""
    return f"{count / 10**9:.1f} GB" if count >= 10**8 else f"{count / 10**6:.1f} MB"
