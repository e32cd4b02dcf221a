"""Sizes and rates of a model, read from its config.json; every other module takes its sizes from here."""

import json
from dataclasses import asdict, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from pipeline.errors import PipelineError

STRUCTURE_PARTS = 4  # a latent cell's structure: its edges in so many parts each way
STRUCTURE_CHANNELS = STRUCTURE_PARTS**2
MOST_STEPS = 32  # denoise passes that a viewer may ask for
SWAP = "swap"  # of a text encoder: held in the machine, each layer on the device while it runs
TILE_PIXELS = 32  # height and width of a tile of the motion mask, for every model
_STRICT = ConfigDict(extra="forbid")

Transition = Literal["cut", "glide", "recache"]


@dataclass(frozen=True, config=_STRICT)
class StudentConfig:
    """Shape of the transformer, in the words of diffusers' `WanTransformer3DModel` and `AnyFlowFARTransformer3DModel`.

    in_channels: the latent's channels; `position_channels` more, which tell a token where it is: rotary embedding
    alone tells only distances, and a small model takes long to find the picture's edges from those; and, last,
    `control_channels` more for the structure of a source (`structure.py`), 0 for a model that knows none.

    Of AnyFlow's alone, None in all others: compressed_patch_size, the larger patches that it sees older frames through;
    full_chunk_limit, how many chunks it sees through the small ones, its own among them; gate_value, how much the time
    where a pass is to end weighs beside that where it begins; deltatime_type, whether it is told that end or the way.
    """

    patch_size: tuple[int, int, int] = (1, 2, 2)
    num_attention_heads: int = 4
    attention_head_dim: int = 48
    in_channels: int = 32
    out_channels: int = 32
    text_dim: int = 128
    freq_dim: int = 256
    ffn_dim: int = 768
    num_layers: int = 6
    cross_attn_norm: bool = True
    qk_norm: str = "rms_norm_across_heads"
    eps: float = 1e-6
    rope_max_seq_len: int = 1024
    position_channels: int = 0
    control_channels: int = 0
    compressed_patch_size: tuple[int, int, int] | None = None
    full_chunk_limit: int | None = None
    gate_value: float | None = None
    deltatime_type: Literal["r", "t-r"] | None = None

    @property
    def coarser(self) -> tuple[int, int]:
        """How many tokens one of the larger patches stands for, down and across; 1, 1: there are none."""
        (_, high, wide), (_, tall, broad) = self.patch_size, self.compressed_patch_size or self.patch_size
        return tall // high, broad // wide


@dataclass(frozen=True, config=_STRICT)
class CodecConfig:
    """Shape of the autoencoder's latents, and of the pocket one. One latent frame carries `frames` pictures.

    first_alone: a stream's first latent frame is one picture, as Wan's is.
    """

    latent_channels: int = 32
    spatial_stride: int = 16
    frames: int = 4
    first_alone: bool = False
    widths: tuple[int, int, int] = (48, 96, 192)


@dataclass(frozen=True, config=_STRICT)
class TextConfig:
    """Shape of the pocket text encoder."""

    length: int = 24
    layers: int = 2
    heads: int = 4
    words: tuple[str, ...] = ()


@dataclass(frozen=True, config=_STRICT)
class SamplerConfig:
    """Flow-matching schedule. `steps` are the unshifted positions (out of 1000) of the denoise passes.

    prediction: what the transformer puts out: the flow (Wan); or the clean latents (a narrow model has no room to carry
    the noise through); or those and, in one channel more, a gate: how much of the latent frame before each one stays,
    so that what stands still is not drawn anew; or the mean flow on the way from one level to the next, which is then
    gone without new noise (AnyFlow). first_steps: those of a stream's first chunk, where they are others.
    any_steps: whether the model was trained for any number of passes, so that a viewer may choose it.
    anchored: passes of a level up to this one see the sink alone of what is remembered, where a chunk is made from
    noise: what a thing looks like is drawn from the stream's opening and the words, not from newest chunks whose wear
    it would hand on. A gate stays that of the pass before them. 0: none.
    """

    shift: float = 3.0
    prediction: Literal["flow", "clean", "gated", "mean_flow"] = "flow"
    steps: tuple[int | float, ...] = (1000, 750, 500, 250)
    first_steps: tuple[int | float, ...] = ()
    any_steps: bool = False
    anchored: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @property
    def most_steps(self) -> int:
        return max(len(self.steps), len(self.first_steps), MOST_STEPS if self.any_steps else 0)


@dataclass(frozen=True, config=_STRICT)
class CacheConfig:
    """Past that a chunk may look at, in latent frames: the first `sink` of the stream and the newest `window`.

    positions: whether a frame's place counts from the stream's start, or from that of the remembered past, where the
    window follows the sink without a gap. clean_pass: whether keys and values are written by a pass of their own on
    clean latents, or by the last denoise pass. sink_keeps: how much of a sink frame's keys and values stays when a
    frame leaves the window; the rest comes from that frame, so that the sink is a running average. 1: it stays.
    rewrites: instead of either, the window is written again after each chunk, by itself, as if the stream had begun
    with it; its oldest frame is one picture then, encoded anew. past_weight: how much a remembered frame weighs in
    attention beside the chunk's own; the sink, or the oldest frame where there is none, weighs as much as the chunk's.
    coarse: frames before the window that are seen through larger patches (`StudentConfig.compressed_patch_size`). They
    are written once, as they leave the window, which is written again behind them; none of it is encoded anew.
    """

    sink: int = 2
    window: int = 4
    coarse: int = 0
    positions: Literal["window", "stream"] = "window"
    clean_pass: bool = True
    sink_keeps: float = 1.0
    rewrites: bool = False
    past_weight: Annotated[float, Field(gt=0, le=1)] = 1.0


@dataclass(frozen=True, config=_STRICT)
class RegionConfig:
    """How the model's held tokens are seen by the active ones.

    carry: keys and values that stand for a held token in a denoise pass. `same_step`: those of the same pass when the
    token was last computed, at the time of this chunk. `own_time`: the same, at the time when they were computed.
    `clean`: those of its last cache pass, at the time of this chunk. `none`: none.
    """

    carry: Literal["same_step", "own_time", "clean", "none"] = "same_step"


@dataclass(frozen=True, config=_STRICT)
class ModelConfig:
    """All that is fixed about a model. Sizes in pixels, rates in frames per second.

    transition: how a new prompt comes in until the viewer says otherwise (`Controls.transition`). loras: low-rank
    weights that were named when the model was loaded, and can be worn; lora_strength: how strongly the first one is.
    motion_aware: whether a source that moves fast gets less noise, unless the viewer says otherwise. first_chunk: how
    many latent frames a stream's first chunk has, where they are fewer than `chunk`; 0: as many.
    """

    name: str = "pocket"
    width: int = 320
    height: int = 192
    fps: int = 16
    chunk: int = 2
    first_chunk: int = 0
    prompt_limit: int = 300
    examples: tuple[str, ...] = ()
    transition: Transition = "cut"
    loras: tuple[str, ...] = ()
    lora_strength: float = 1.0
    motion_aware: bool = False
    student: StudentConfig = field(default_factory=StudentConfig)
    codec: CodecConfig = field(default_factory=CodecConfig)
    text: TextConfig = field(default_factory=TextConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    regions: RegionConfig = field(default_factory=RegionConfig)

    def __post_init__(self) -> None:
        _, high, wide = self.student.compressed_patch_size or self.student.patch_size
        cell = (self.codec.spatial_stride * high, self.codec.spatial_stride * wide)
        if self.height % cell[0] or self.width % cell[1]:
            raise ValueError(f"{self.width}x{self.height} does not divide into tokens of {cell[1]}x{cell[0]} pixels")
        student = self.student
        channels = self.codec.latent_channels + student.position_channels + student.control_channels
        if channels != student.in_channels:
            raise ValueError(
                f"latents, positions and control have {channels} channels, the student {student.in_channels}"
            )
        out_channels = self.codec.latent_channels + (self.sampler.prediction == "gated")
        if student.out_channels != out_channels:
            raise ValueError(f"the student puts out {student.out_channels} channels, its prediction has {out_channels}")
        if not 0 <= self.first_chunk <= self.chunk:
            raise ValueError(f"a first chunk of {self.first_chunk} is none of chunks of {self.chunk}")
        if (self.student.gate_value is None) == (self.sampler.prediction == "mean_flow"):
            raise ValueError("a mean flow is put out by a transformer that is told where a pass ends, and by no other")
        if self.student.compressed_patch_size or self.cache.coarse:
            self._check_coarse()
        elif self.cache.rewrites and (self.cache.sink or self.cache.window > self.chunk):
            raise ValueError("a past that is written again after each chunk is of that chunk alone, without a sink")
        if student.control_channels not in (0, STRUCTURE_CHANNELS):
            raise ValueError(f"control_channels is {student.control_channels}; structure has {STRUCTURE_CHANNELS}")

    def _check_coarse(self) -> None:
        student, cache = self.student, self.cache
        if not (student.compressed_patch_size and student.full_chunk_limit):
            raise ValueError("a past that is seen through larger patches wants a transformer that has them")
        if not cache.coarse or not cache.rewrites or cache.sink or cache.sink_keeps != 1 or cache.past_weight != 1:
            raise ValueError("a coarse past is followed by a window that is written again, without a sink or weights")
        if self.sampler.anchored:
            raise ValueError("anchored passes see a sink, and beside a coarse past there is none")
        if cache.window != (student.full_chunk_limit - 1) * self.chunk:
            raise ValueError(f"a window of {cache.window} is not {student.full_chunk_limit - 1} chunks of {self.chunk}")

    @property
    def frames_per_chunk(self) -> int:
        return self.chunk * self.codec.frames

    def latent_frames(self, index: int) -> int:
        """Those of the chunk of this index."""
        return self.first_chunk or self.chunk if index == 0 else self.chunk

    def chunk_of(self, frame: int) -> int:
        """The index of the chunk that a stream's latent frame is in."""
        return (frame + self.chunk - self.latent_frames(0)) // self.chunk

    def pictures(self, index: int) -> int:
        """Pictures that the chunk of this index shows."""
        alone = self.codec.frames - 1 if self.codec.first_alone and index == 0 else 0
        return self.latent_frames(index) * self.codec.frames - alone

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width of a latent frame."""
        return self.height // self.codec.spatial_stride, self.width // self.codec.spatial_stride

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of a latent frame in tokens."""
        height, width = self.latent_size
        return height // self.student.patch_size[1], width // self.student.patch_size[2]

    @property
    def tokens_per_frame(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def tiles(self) -> tuple[int, int] | None:
        """Rows and columns of mask tiles; None where they do not cover the picture, or the past, in whole tokens."""
        stride, (_, high, wide) = self.codec.spatial_stride, self.student.patch_size
        if (
            self.cache.coarse
            or any(size % TILE_PIXELS for size in (self.height, self.width))
            or TILE_PIXELS % (stride * high)
            or TILE_PIXELS % (stride * wide)
        ):
            return None
        return self.height // TILE_PIXELS, self.width // TILE_PIXELS

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)


@dataclass(frozen=True, config=_STRICT)
class WanModel:
    """Where the parts of a Wan model lie; it pickles.

    tiny: the file of the tiny codec; None is the autoencoder. prompts: a folder for what the text encoder made.
    text_device, text_bits: where it computes, and in which precision, 16 or 8; SWAP: held in the machine's memory, it
    computes on the student's device. bits: 8 holds the student's layers in bytes, 16 in the precision that the device
    computes in. family: the row of the table that it is; None: one's own.
    """

    config: ModelConfig
    transformer: Path
    text_encoder: Path
    tokenizer: Path
    vae: Path
    tiny: Path | None = None
    prompts: Path | None = None
    text_device: str = "cpu"
    text_bits: int = 16
    bits: int = 16
    family: str | None = None


def load_config(path: Path) -> ModelConfig:
    """Read a config.json. Raises PipelineError (`config_missing`, `config_invalid`)."""
    if not path.is_file():
        raise PipelineError("config_missing", f"There is no model configuration at {path}.", "Name a model folder.")
    try:
        return TypeAdapter(ModelConfig).validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the file"
        raise PipelineError(
            "config_invalid",
            f"{path} is not a model configuration: {place}: {first['msg']}.",
            "Correct what is named, or restore the file from where it came.",
        ) from error
