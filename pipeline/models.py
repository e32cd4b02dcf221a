"""The table of model families: one row of data each, and nothing done with it.

A row says where a student is to be had, what its checkpoint looks like and how it wants to be run, in the words of its
makers; `sampler` and `cache` say the same in ours. What no source states is named in `unverified`. Whoever has a
student that is not here names its folder instead. Knows no network, no disk and no torch.
"""

from dataclasses import dataclass
from typing import Literal

from pipeline.config import (
    CacheConfig,
    CodecConfig,
    ModelConfig,
    RegionConfig,
    SamplerConfig,
    StudentConfig,
    Transition,
)
from pipeline.downloads import PARTS, Download
from pipeline.errors import PipelineError


@dataclass(frozen=True)
class TextWeights:
    """Of a text encoder, which is held in two bytes a number, whatever the hub has."""

    tables: int = 0
    """Embeddings, norms and biases."""
    layers: int = 0
    """Of linear layers, which can be kept in a byte each."""
    rows: int = 0
    """Of those layers; each has a scale of its own then."""
    widest: int = 0
    """Of the largest layer, which a CPU copies in single precision while it runs."""


@dataclass(frozen=True)
class CodecWeights:
    """Of an autoencoder, and what it remembers of a stream, in numbers to a pixel of the picture."""

    weights: int
    encoder: float = 0
    decoder: float = 0


@dataclass(frozen=True)
class Base:
    """A transformer's shape, and what stands beside it."""

    title: str
    shape: StudentConfig
    channels: int
    """Of the latents that it draws."""
    stride: int
    """Pixels to a latent cell, along each side."""
    codec: CodecWeights
    """With the weights of a text encoder that is none of `text`."""
    text: TextWeights = TextWeights()
    parts: tuple[Download, ...] = ()
    """Where those are to be had."""


_UMT5_XXL = TextWeights(tables=1_050_398_720, layers=4_630_511_616, rows=983_040, widest=125_833_216)
_WAN_VAE = CodecWeights(126_892_531, encoder=1404, decoder=2364.5)
TINY_DECODER = CodecWeights(9_844_611, decoder=84)
TINY_ENCODER = CodecWeights(1_470_928, encoder=63)

WAN_SMALL = StudentConfig(
    num_attention_heads=12,
    attention_head_dim=128,
    in_channels=16,
    out_channels=16,
    text_dim=4096,
    ffn_dim=8960,
    num_layers=30,
)
WAN_LARGE = StudentConfig(
    num_attention_heads=40,
    attention_head_dim=128,
    in_channels=16,
    out_channels=16,
    text_dim=4096,
    ffn_dim=13824,
    num_layers=40,
)
BASES = {
    "pocket": Base(
        "Pocket",
        StudentConfig(in_channels=60, out_channels=33, position_channels=12, control_channels=16),
        32,
        16,
        CodecWeights(5_087_009),
    ),
    "wan-1.3b": Base("Wan 2.1 1.3B", WAN_SMALL, 16, 8, _WAN_VAE, _UMT5_XXL, PARTS),
    "wan-14b": Base("Wan 2.1 14B", WAN_LARGE, 16, 8, _WAN_VAE, _UMT5_XXL, PARTS),
}


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
    layout: Literal["pocket", "wan", "anyflow"] = "wan"
    """Whose modules the weights belong to. Those of AnyFlow have more than Wan's."""
    steps: tuple[int, ...] = (1000, 750, 500, 250)
    first_steps: tuple[int, ...] = ()
    """Steps of a stream's first chunk, where they are others."""
    shift: float = 5.0
    shifted: bool = True
    """Whether the shift moves the steps; otherwise they are timesteps as they stand."""
    any_steps: bool = False
    chunk: int = 3
    attends: int = 21
    """Latent frames that a pass looks at: sink, window and the chunk itself."""
    sink: int = 0
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
        """Latent frames of the past beyond the sink."""
        return self.attends - self.sink - self.chunk

    @property
    def sampler(self) -> SamplerConfig:
        return SamplerConfig(
            shift=self.shift if self.shifted else 1.0,
            steps=self.steps,
            first_steps=self.first_steps,
            any_steps=self.any_steps,
        )

    @property
    def cache(self) -> CacheConfig:
        return CacheConfig(
            sink=self.sink,
            window=self.window,
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


_CAUSAL_FORCING = "https://github.com/thu-ml/Causal-Forcing"
_STREAM_V2 = "https://github.com/chenfengxu714/StreamDiffusionV2"
_ANYFLOW = "https://github.com/NVlabs/AnyFlow"
_FIRST = "A stream's first chunk takes four steps."
_FAR = "Looks at older frames through larger patches and knows where a pass is to end: modules that Wan does not have."
_LONG_PAST = "Trained on 21 latent frames; longer streams are beyond its training."

FAMILIES = (
    Family(
        name="pocket",
        title="The embedded student",
        base="pocket",
        source="pipeline/pocket/README.md",
        licence="Apache-2.0",
        commercial=True,
        layout="pocket",
        shift=3.0,
        chunk=2,
        attends=8,
        sink=2,
        positions="window",
        carry="same_step",
        remark="Draws the procedural world only.",
    ),
    Family(
        name="self-forcing",
        title="Self-Forcing (DMD)",
        base="wan-1.3b",
        source="https://github.com/guandeh17/Self-Forcing",
        licence="Apache-2.0",
        commercial=True,
        repo="gdhe17/Self-Forcing",
        files=("checkpoints/self_forcing_dmd.pt",),
        weights="generator_ema",
        remark=_LONG_PAST,
    ),
    Family(
        name="causal-forcing",
        title="Causal-Forcing, chunk by chunk",
        base="wan-1.3b",
        source=_CAUSAL_FORCING,
        licence="Apache-2.0 (of the code)",
        commercial=None,
        repo="zhuhz22/Causal-Forcing",
        files=("chunkwise/causal_forcing.pt",),
        weights="generator",
        remark=_LONG_PAST,
        unverified=("licence",),
    ),
    Family(
        name="causal-forcing-frame",
        title="Causal-Forcing, frame by frame",
        base="wan-1.3b",
        source=_CAUSAL_FORCING,
        licence="Apache-2.0 (of the code)",
        commercial=None,
        repo="zhuhz22/Causal-Forcing",
        files=("framewise/causal_forcing.pt",),
        weights="generator_ema",
        chunk=1,
        remark=_LONG_PAST,
        unverified=("licence",),
    ),
    Family(
        name="causal-forcing-2step",
        title="Causal-Forcing++, two steps",
        base="wan-1.3b",
        source=_CAUSAL_FORCING,
        licence="Apache-2.0 (of the code)",
        commercial=None,
        repo="zhuhz22/Causal-Forcing",
        files=("causal-forcing++/framewise-2step.pt",),
        weights="generator_ema",
        steps=(1000, 500),
        first_steps=(1000, 750, 500, 250),
        chunk=1,
        remark=_FIRST,
        unverified=("licence",),
    ),
    Family(
        name="causal-forcing-1step",
        title="Causal-Forcing++, one step",
        base="wan-1.3b",
        source=_CAUSAL_FORCING,
        licence="Apache-2.0 (of the code)",
        commercial=None,
        repo="zhuhz22/Causal-Forcing",
        files=("causal-forcing++/framewise-1step.pt",),
        weights="generator_ema",
        steps=(1000,),
        first_steps=(1000, 750, 500, 250),
        chunk=1,
        remark=_FIRST,
        unverified=("licence",),
    ),
    Family(
        name="longlive",
        title="LongLive 1",
        base="wan-1.3b",
        source="https://github.com/NVlabs/LongLive",
        licence="CC-BY-NC-SA-4.0",
        commercial=False,
        repo="Efficient-Large-Model/LongLive-1.3B",
        files=("models/longlive_base.pt", "models/lora.pt"),
        weights="generator",
        lora="models/lora.pt",
        lora_weights="generator_lora",
        attends=12,
        sink=3,
        transition="recache",
        remark="The base alone is only where its training began. A new prompt wants the window written again.",
        unverified=("licence",),
    ),
    Family(
        name="reward-forcing",
        title="Reward-Forcing",
        base="wan-1.3b",
        source="https://github.com/JaydenLyh/Reward-Forcing",
        licence="Apache-2.0 (of the code)",
        commercial=None,
        repo="JaydenLu666/Reward-Forcing-T2V-1.3B",
        files=("rewardforcing.pt",),
        attends=9,
        sink=3,
        positions="window",
        sink_keeps=0.999,
        remark="Its sink is a running average of what leaves the window.",
        unverified=("licence",),
    ),
    Family(
        name="krea-realtime",
        title="Krea Realtime 14B",
        base="wan-14b",
        source="https://github.com/krea-ai/realtime-video",
        licence="CC-BY-NC-SA-4.0",
        commercial=False,
        repo="krea/krea-realtime-video",
        files=("krea-realtime-video-14b.safetensors",),
        attends=6,
        positions="window",
        rewrites=True,
        past_weight=0.3,
        remark="The window is written again for each chunk, its oldest frame encoded anew; what is past weighs less.",
        unverified=("past_weight",),
    ),
    Family(
        name="streamdiffusion-v2",
        title="StreamDiffusionV2 1.3B",
        base="wan-1.3b",
        source=_STREAM_V2,
        licence="Apache-2.0 (of the code)",
        commercial=None,
        repo="jerryfeng/StreamDiffusionV2",
        files=("wan_causal_dmd_v2v/model.pt",),
        weights="generator",
        steps=(700, 500, 400, 200),
        shift=8.0,
        shifted=False,
        chunk=1,
        attends=6,
        sink=3,
        clean_pass=False,
        motion_aware=True,
        remark="Draws over a video: its first step is not pure noise.",
        unverified=("licence",),
    ),
    Family(
        name="streamdiffusion-v2-14b",
        title="StreamDiffusionV2 14B",
        base="wan-14b",
        source=_STREAM_V2,
        licence="not stated; made by CausVid-Plus",
        commercial=None,
        repo="jerryfeng/StreamDiffusionV2",
        files=("wan_causal_dmd_v2v_14b/model.pt",),
        weights="generator",
        steps=(700, 500, 400, 200),
        shift=8.0,
        shifted=False,
        chunk=1,
        attends=6,
        sink=3,
        clean_pass=False,
        motion_aware=True,
        remark="Draws over a video: its first step is not pure noise.",
        unverified=("licence", "weights"),
    ),
    Family(
        name="anyflow-far",
        title="AnyFlow-FAR 1.3B",
        base="wan-1.3b",
        source=_ANYFLOW,
        licence="other (the code is Apache-2.0)",
        commercial=None,
        repo="nvidia/AnyFlow-FAR-Wan2.1-1.3B-Diffusers",
        files=("transformer/*",),
        layout="anyflow",
        any_steps=True,
        remark=_FAR,
        unverified=("licence", "attends"),
    ),
    Family(
        name="anyflow-far-14b",
        title="AnyFlow-FAR 14B",
        base="wan-14b",
        source=_ANYFLOW,
        licence="other (the code is Apache-2.0)",
        commercial=None,
        repo="nvidia/AnyFlow-FAR-Wan2.1-14B-Diffusers",
        files=("transformer/*",),
        layout="anyflow",
        any_steps=True,
        remark=_FAR,
        unverified=("licence", "attends"),
    ),
)


def family(name: str) -> Family:
    """The row of this name. Raises PipelineError (`model_unknown`)."""
    for row in FAMILIES:
        if row.name == name:
            return row
    known = ", ".join(row.name for row in FAMILIES)
    raise PipelineError(
        "model_unknown", f"There is no model {name!r} in the table.", f"Choose one of {known}, or name a folder."
    )


def download(name: str) -> Download:
    """A family, or one of the parts that stand beside one. Raises PipelineError (`model_unknown`)."""
    return next((part for part in PARTS if part.name == name), None) or family(name)
