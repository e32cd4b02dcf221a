"""How much memory a model wants, reckoned from its row before anything is loaded. Arithmetic; measures nothing.

Weights and what a stream remembers are exact. What a pass and the decoder need on top is an estimate, since it hangs on
the kernels. What a driver and torch themselves take is not counted.
"""

from dataclasses import dataclass, replace
from math import prod

from pipeline.bases import BASES, TINY_DECODER, TINY_ENCODER, TextWeights
from pipeline.config import SWAP, StudentConfig
from pipeline.errors import PipelineError
from pipeline.family import Family

SCALE_BYTES = 4
"""Of a row of 8-bit weights."""
PROMPT_PLACES = 512
"""Of Wan's text encoder; every prompt is padded to it."""


def parameters(shape: StudentConfig) -> int:
    """Weights of a transformer, as diffusers builds it."""
    dim, patch = shape.num_attention_heads * shape.attention_head_dim, prod(shape.patch_size)
    attention = 4 * (dim * dim + dim) + 2 * dim
    layer = 2 * attention + 6 * dim + 2 * dim * shape.ffn_dim + shape.ffn_dim + dim + 2 * dim * shape.cross_attn_norm
    when = shape.freq_dim * dim + dim + dim * dim + dim
    time = when * (1 if shape.gate_value is None else 2) + 6 * dim * dim + 6 * dim
    text = shape.text_dim * dim + dim + dim * dim + dim
    ends = (shape.in_channels * patch + 1) * dim + (dim + 1) * shape.out_channels * patch + 2 * dim
    if shape.compressed_patch_size:
        ends += (shape.in_channels * prod(shape.compressed_patch_size) + 1) * dim
    return shape.num_layers * layer + time + text + ends


def student_bytes(shape: StudentConfig, number_bytes: int, bits: int) -> int:
    """A transformer's room; bits: 8 holds the linear layers of its blocks in bytes, 16 all of it in number_bytes."""
    if bits == 16:
        return number_bytes * parameters(shape)
    dim = shape.num_attention_heads * shape.attention_head_dim
    layers = shape.num_layers * (8 * dim * dim + 2 * dim * shape.ffn_dim)
    rows = shape.num_layers * (9 * dim + shape.ffn_dim)
    return number_bytes * (parameters(shape) - layers) + layers + SCALE_BYTES * rows


def text_bytes(text: TextWeights, bits: int) -> int:
    """A text encoder's room; bits: of its layers' weights, 16 or 8."""
    if bits == 16:
        return 2 * (text.tables + text.layers)
    return 2 * text.tables + text.layers + SCALE_BYTES * text.rows


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What memory hangs on beside a model's row. width, height: in pixels.

    cpu: the device is the CPU, which computes in single precision. bits, text_bits: of the layers of the student and of
    Wan's text encoder, which is where text_on says: `beside` the student, on its device; in the machine's memory, where
    the `cpu` computes, or SWAP; on another device of that name; `auto`: beside, or on the CPU where that is too much.
    tiny: decode by the tiny decoder; tiny_encodes: its file has an encoder too, which then encodes. loras: bytes of
    each file of low-rank weights. workers: processes, each with a model of its own.
    """

    width: int
    height: int
    cpu: bool = False
    bits: int = 16
    text_bits: int = 16
    text_on: str = "auto"
    tiny: bool = False
    tiny_encodes: bool = True
    loras: tuple[int, ...] = ()
    workers: int = 1

    @property
    def places(self) -> tuple[str, ...]:
        """Of the text encoder, the quickest first."""
        if self.text_on == "auto":
            return ("beside",) if self.cpu else ("beside", "cpu")
        return ("beside",) if self.cpu and self.text_on in ("cpu", SWAP) else (self.text_on,)

    @property
    def apart(self) -> str | None:
        """The text encoder's device, where it has one of its own."""
        return None if self.text_on in ("auto", "beside", "cpu", SWAP) else self.text_on


@dataclass(frozen=True)
class Room:
    """Bytes that are free: of the device; of the machine, unless that is the device; of the text encoder's own."""

    free: int
    host_free: int | None = None
    apart_free: int | None = None

    def __str__(self) -> str:
        told = f"{amount(self.free)} are free"
        if self.host_free is not None:
            told += f" on the GPU and {amount(self.host_free)} in the machine"
        return told if self.apart_free is None else f"{told}, {amount(self.apart_free)} on the text encoder's device"


@dataclass(frozen=True)
class Plan:
    """Bytes of one worker by what they are for, with one stream at one size."""

    setup: Setup
    student: int
    past: int
    """What a stream remembers: keys and values, regions, what the codec saw last."""
    work: int
    """An estimate."""
    codec: int
    text: int
    reading: int = 0
    """What the text encoder copies while it reads: on a CPU, or swapped."""
    loras: int = 0
    """Low-rank weights that are worn, at most: files store a number in two bytes or more."""
    lora_files: int = 0
    """All that can be worn, in the machine's memory."""

    @property
    def device(self) -> int:
        """Bytes on the device, of all workers."""
        held = self.student + self.loras + self.past + self.work + self.codec + self.setup.cpu * self.lora_files
        text_on = self.setup.places[0]
        if text_on == "beside":
            held += self.text + self.reading
        elif text_on == SWAP:
            held += self.reading
        return self.setup.workers * held

    @property
    def host(self) -> int:
        """Bytes in the machine's memory, of all workers; 0 where that is the device."""
        if self.setup.cpu:
            return 0
        text = {"cpu": self.text + self.reading, SWAP: self.text}.get(self.setup.text_on, 0)
        return self.setup.workers * (self.lora_files + text)

    @property
    def apart(self) -> int:
        """Bytes on the text encoder's own device, of all workers."""
        return self.setup.workers * self.text if self.setup.apart else 0

    @property
    def title(self) -> str:
        """Where things are, and in which flags the bits are asked for."""
        text_on = self.setup.places[0]
        where = {
            "beside": f"all on the {'CPU' if self.setup.cpu else 'GPU'}",
            "cpu": "text encoder on the CPU",
            SWAP: "text encoder swapped",
        }
        return ", ".join(filter(None, (where.get(text_on, f"text encoder on {text_on}"), self.flags)))

    @property
    def flags(self) -> str:
        asked = (("--bits 8", self.setup.bits), ("--text-bits 8", self.setup.text_bits))
        return " ".join(flag for flag, bits in asked if bits == 8)

    @property
    def wants(self) -> str:
        told = amount(self.device) + (f" and {amount(self.host)} in the machine" if self.host else "")
        return told + (f" and {amount(self.apart)} on {self.setup.apart}" if self.apart else "")

    def fits(self, room: Room) -> bool:
        return self.device <= room.free and self.host <= (room.host_free or 0) and self.apart <= (room.apart_free or 0)


def plan(row: Family, setup: Setup) -> Plan:
    """What one stream of a family wants.

    Raises PipelineError (`size_invalid`).
    """
    base, shape, width, height = BASES[row.base], row.shape, setup.width, setup.height
    cell = base.stride * shape.patch_size[1]
    large = cell * shape.coarser[0]
    if width < large or height < large or width % large or height % large:
        raise PipelineError(
            "size_invalid",
            f"{width}x{height} does not divide into the {large}x{large} pixels of a token.",
            f"Choose multiples of {large}, such as {max(1, width // large) * large}x{max(1, height // large) * large}.",
        )
    number_bytes = 4 if setup.cpu or row.layout == "pocket" else 2
    dim = shape.num_attention_heads * shape.attention_head_dim
    tokens, pixels = (width // cell) * (height // cell), width * height
    frames = tokens * (row.sink + row.window) + tokens * row.coarse // prod(shape.coarser)
    looked_at = frames + tokens * row.chunk
    if setup.cpu:  # keeps them rotated too, with room for the chunk itself
        frames += frames + tokens * row.chunk
    frames += PROMPT_PLACES
    if row.carry == "same_step":  # those of every pass, and of one more for a strength between levels
        frames += tokens * row.chunk * (row.sampler.most_steps + 1)
    tiny = setup.tiny and row.layout == "wan"
    decoder = TINY_DECODER if tiny else base.codec
    encoder = TINY_ENCODER if tiny and setup.tiny_encodes else base.codec
    seen = int((encoder.encoder + decoder.decoder) * pixels)
    # A layer's widest moment: normed tokens, queries, keys of all it looks at, the hidden layer; then the decoder's
    # last stage, which is four pictures of 96 channels.
    layer = tokens * row.chunk * (shape.ffn_dim + 8 * dim) + 2 * looked_at * dim
    layer += dim * shape.ffn_dim * (setup.bits == 8)
    text_on = setup.places[0]
    # The text encoder's largest layer, in single precision or, swapped, as wide as it is at most.
    copied = {"beside": 4 * setup.cpu, "cpu": 4, SWAP: 2}.get(text_on, 0)
    return Plan(
        setup,
        student=student_bytes(shape, number_bytes, setup.bits),
        past=number_bytes * (2 * shape.num_layers * frames * dim + seen),
        work=number_bytes * max(layer, 3 * 96 * 4 * pixels),
        codec=number_bytes * (decoder.weights + (encoder.weights if tiny else 0)),
        text=text_bytes(base.text, setup.text_bits),
        reading=copied * base.text.widest,
        loras=max(setup.loras, default=0) * number_bytes // 2,
        lora_files=sum(setup.loras),
    )


def ways(row: Family, setup: Setup) -> list[Plan]:
    """How a model can be placed, the quickest first: with the bits that are asked for, and then with fewer.

    Raises PipelineError (`size_invalid`).
    """
    if row.layout == "pocket":
        return [plan(row, replace(setup, bits=16, text_bits=16, text_on="beside"))]
    precisions = dict.fromkeys(((setup.bits, setup.text_bits), (setup.bits, 8), (8, 8)))
    return [
        plan(row, replace(setup, bits=bits, text_bits=text_bits, text_on=text_on))
        for bits, text_bits in precisions
        for text_on in setup.places
    ]


def choose(row: Family, setup: Setup, room: Room) -> Plan:
    """The first way that fits with the bits that are asked for.

    Raises PipelineError (`memory_short`, `size_invalid`).
    """
    plans = ways(row, setup)
    fitting = [each for each in plans if each.fits(room)]
    if fitting and fitting[0].flags == plans[0].flags:
        return fitting[0]
    told = "; ".join(f"{each.title}: {each.wants}{', fits' if each.fits(room) else ''}" for each in plans)
    remedy = "Choose a smaller model or picture, or end what else is running."
    if setup.text_on != "auto":
        remedy = "Choose another --text-device, a smaller model or picture, or end what else is running."
    if setup.workers > 1:
        remedy = f"Choose fewer workers than {setup.workers}, or a smaller model or picture."
    raise PipelineError(
        "memory_short",
        f"{row.title} does not fit: {room}, it wants {told}.",
        f"Add {fitting[0].flags}, which fits." if fitting else remedy,
    )


def amount(count: int) -> str:
    """Bytes, as people say them."""
    return f"{count / 10**9:.1f} GB" if count >= 10**8 else f"{count / 10**6:.1f} MB"
