"""A row of the table of families: what its columns are, and the configuration that follows from them.

A row says where a student is to be had, what its checkpoint looks like and how it wants to be run, in the words of its
makers; `sampler` and `cache` say the same in ours. What no source states is named in `unverified`. Knows no network, no
disk and no torch.
"""

from dataclasses import dataclass
from typing import Literal

from pipeline.bases import BASES
from pipeline.config import (
    CacheConfig,
    CodecConfig,
    ModelConfig,
    RegionConfig,
    SamplerConfig,
    StudentConfig,
    Transition,
)
from pipeline.downloads import Download

WAN_SIZE = (832, 480)
"""Width and height that a family is run at unless another is asked for."""
WAN_EXAMPLES = (
    "A red panda walks along a mossy branch in a misty forest, soft morning light, a slow tracking shot.",
    "Waves roll onto a black beach under low clouds, seen from above, spray in the wind.",
    "A potter shapes a bowl on a turning wheel, wet clay shines, warm light from a window.",
)


@dataclass(frozen=True, kw_only=True)
class Family(Download):
    """One row."""

    base: str
    weights: str | None = None
    """The entry of the checkpoint that holds the weights; None: the checkpoint is the weights."""
    lora: str | None = None
    """The file of thin layers without which the student is not itself."""
    lora_weights: str | None = None
    layout: Literal["pocket", "wan"] = "wan"
    """What surrounds the student: a whole model folder, or the parts that all on Wan share."""
    steps: tuple[int | float, ...] = (1000, 750, 500, 250)
    first_steps: tuple[int | float, ...] = ()
    """Steps of a stream's first chunk, where they are others."""
    shift: float = 5.0
    shifted: bool = True
    """Whether the shift moves the steps; otherwise they are timesteps as they stand."""
    any_steps: bool = False
    prediction: Literal["flow", "mean_flow"] = "flow"
    """What a pass puts out: the flow, or its mean on the way to where the next one begins."""
    chunk: int = 3
    first_chunk: int = 0
    """Latent frames of a stream's first chunk, where they are fewer."""
    attends: int = 21
    """Latent frames that a pass looks at: sink, coarse past, window and the chunk itself."""
    sink: int = 0
    coarse: int = 0
    """Those before the window that are seen through larger patches."""
    positions: Literal["stream", "window"] = "stream"
    """How it was trained: a frame's place counts from the stream's start, or from that of the remembered past."""
    clean_pass: bool = True
    """Whether keys and values are written by a pass of their own, on clean latents."""
    sink_keeps: float = 1.0
    """How much of the sink stays when a frame leaves the window and is averaged into it; 1: all."""
    rewrites: bool = False
    """Whether the window is written again after each chunk, by itself and with its oldest frame encoded anew."""
    past_weight: float = 1.0
    """How much a remembered frame, but for the sink, or the oldest where there is none, weighs in attention."""
    carry: Literal["same_step", "clean"] = "clean"
    """Which keys stand for a held region. Those of every pass would be more than the past itself of a Wan."""
    transition: Transition = "cut"
    """How a new prompt comes in unless the viewer says otherwise."""
    motion_aware: bool = False
    """Whether a source gets less noise where it moves fast, unless the viewer says otherwise."""
    remark: str = ""

    @property
    def window(self) -> int:
        """Latent frames of the past beyond the sink that are seen as they are."""
        return self.attends - self.sink - self.coarse - self.chunk

    @property
    def past(self) -> str:
        """How many frames of which kind, as tables have it."""
        return " + ".join([str(self.sink), *([f"{self.coarse} coarse"] if self.coarse else []), str(self.window)])

    @property
    def sampler(self) -> SamplerConfig:
        return SamplerConfig(
            shift=self.shift if self.shifted else 1.0,
            steps=self.steps,
            first_steps=self.first_steps,
            any_steps=self.any_steps,
            prediction=self.prediction,
        )

    @property
    def cache(self) -> CacheConfig:
        return CacheConfig(
            sink=self.sink,
            window=self.window,
            coarse=self.coarse,
            positions=self.positions,
            clean_pass=self.clean_pass,
            sink_keeps=self.sink_keeps,
            rewrites=self.rewrites,
            past_weight=self.past_weight,
        )

    @property
    def shape(self) -> StudentConfig:
        return BASES[self.base].shape

    def config(self, width: int, height: int) -> ModelConfig:
        """What the engine runs it with. Raises ValueError for a size that does not divide into tokens."""
        base = BASES[self.base]
        codec = CodecConfig(latent_channels=base.channels, spatial_stride=base.stride, first_alone=self.layout == "wan")
        return ModelConfig(
            name=self.name,
            width=width,
            height=height,
            chunk=self.chunk,
            first_chunk=self.first_chunk,
            prompt_limit=1000,
            examples=WAN_EXAMPLES,
            transition=self.transition,
            motion_aware=self.motion_aware,
            regions=RegionConfig(carry=self.carry),
            student=base.shape,
            codec=codec,
            sampler=self.sampler,
            cache=self.cache,
        )
