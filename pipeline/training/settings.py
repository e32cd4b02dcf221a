"""What a training run is made of: one strict value, the pocket student's by default, or read from a TOML file.

A file names only what differs; `recipe = "wan"` chooses the run of a Wan model. What the folders named in it say about
the model need not be said again. Knows nothing of how a stage trains.
"""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from pipeline.bases import WAN_SMALL
from pipeline.config import (
    CacheConfig,
    CodecConfig,
    ModelConfig,
    RegionConfig,
    SamplerConfig,
    StudentConfig,
    TextConfig,
    load_config,
)
from pipeline.errors import PipelineError
from pipeline.family import WAN_EXAMPLES
from pipeline.layout import not_ours, read_transformer_shape
from pipeline.structure import CHANNELS
from pipeline.training import captions

_STRICT = ConfigDict(extra="forbid")
_UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0}
_BUDGET = re.compile(r"(\d+(?:\.\d+)?)\s*([smh])")


def seconds(budget: object) -> object:
    """'90s', '20m' or '1.5h' in seconds; numbers are seconds already."""
    if isinstance(budget, str):
        match = _BUDGET.fullmatch(budget.strip())
        if match is None:
            raise ValueError(f"{budget!r} is not a time like 90s, 20m or 1.5h")
        return float(match[1]) * _UNITS_S[match[2]]
    return budget


Seconds = Annotated[float, BeforeValidator(seconds), Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0)]
Target = Literal["endpoint", "consistency"]


@dataclass(frozen=True, config=_STRICT)
class StageSettings:
    """budget_s: time of training. steps: an end in steps, whichever comes first.
    save_s, sample_s: time between checkpoints, between samples to look at.
    accumulate: batches whose gradients are added up for one step of the optimizer.
    muon: matrices between layers go to Muon, the rest to AdamW, both at `learning_rate`.
    """

    budget_s: Seconds = 60.0
    steps: Count | None = None
    learning_rate: Rate = 1e-3
    warm_up_steps: Count = 100
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    clip: Rate = 1.0
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.999
    save_s: Seconds = 60.0
    sample_s: Seconds = 300.0
    accumulate: Count = 1
    muon: bool = False


@dataclass(frozen=True, config=_STRICT)
class AutoencoderSettings(StageSettings):
    """batch: crops a step. generic_share: how many of them are not of the world. keep: the start's codec as it is."""

    keep: bool = False
    batch: Count = 8
    generic_share: Annotated[float, Field(ge=0, le=1)] = 0.35


@dataclass(frozen=True, config=_STRICT)
class ClipSettings:
    """How many openings (one chunk each) and whole clips are encoded.

    folder: your own clips with captions, instead of the world; they also give the text encoder its words.
    """

    openings: Count = 6000
    clips: Count = 2600
    folder: str | None = None


@dataclass(frozen=True, config=_STRICT)
class TeacherSettings(StageSettings):
    """openings, clips: the batch of a step that sees the one or the other."""

    openings: Count = 40
    clips: Count = 8


@dataclass(frozen=True, config=_STRICT)
class StudentSettings(StageSettings):
    """guidance: how far beyond its words the teacher is led; the student learns it in.
    rolled: share of the steps with whole clips from noise whose past the student makes itself, in streams of up to
    `longest` chunks, half of which change their prompt near the end.
    target: where the teacher's guided walk ends (`endpoint`), or what the student says of it two steps down
    (`consistency`); or what the run's `start` says in that one pass (`start`): a student stays as it is, and only its
    anchored passes learn. There is no teacher then.
    anchored: share of the steps that teach an anchored pass, beside those that come to one anyway. It learns from true
    clips: nothing but them tells it more than it sees.
    """

    openings: Count = 24
    clips: Count = 5
    guidance: Annotated[float, Field(ge=1)] = 2.0
    target: Literal["endpoint", "consistency", "start"] = "endpoint"
    rolled: Annotated[float, Field(ge=0, le=1)] = 0.5
    longest: Annotated[int, Field(ge=4)] = 32
    anchored: Annotated[float, Field(ge=0, le=1)] = 0.0


@dataclass(frozen=True, config=_STRICT)
class MatchingSettings(StageSettings):
    """on: whether the stage is run at all. streams: rolled out side by side, up to `longest` chunks each.
    critic_alone: steps before the student learns. held: share of the steps whose rollouts hold random tiles, as region
    caching does.
    """

    on: bool = False
    streams: Count = 8
    longest: Annotated[int, Field(ge=4)] = 12
    critic_alone: Annotated[int, Field(ge=0)] = 40
    held: Annotated[float, Field(ge=0, le=1)] = 0.0
    guidance: Annotated[float, Field(ge=1)] = 2.0


EXAMPLES = (
    "a red ball bounces on the beach",
    "a blue fish moves left under water, neon style",
    "a yellow star circles in the city at night",
    "an orange robot sways on a stage in front of an audience",
    "a pink heart moves right in the snow, pastel",
    "a green flower stands still in the park, pencil sketch",
)


def pocket_config() -> ModelConfig:
    """The configuration of the embedded model."""
    return ModelConfig(
        examples=EXAMPLES,
        codec=CodecConfig(latent_channels=32),
        student=StudentConfig(
            in_channels=32 + 12 + CHANNELS, out_channels=32 + 1, position_channels=12, control_channels=CHANNELS
        ),
        text=TextConfig(words=captions.WORDS),
        sampler=SamplerConfig(prediction="gated"),
    )


@dataclass(frozen=True, config=_STRICT)
class TrainSettings:
    """One run, stage by stage; `TrainSettings()` is the pocket student's.

    start: a model folder whose weights the stages begin with, `pocket` for the embedded one; none: from nothing.
    """

    start: str | None = None
    model: ModelConfig = field(default_factory=pocket_config)
    autoencoder: AutoencoderSettings = AutoencoderSettings(budget_s=1200.0, learning_rate=6e-4, ema=0.998)
    clips: ClipSettings = ClipSettings()
    teacher: TeacherSettings = TeacherSettings(budget_s=4700.0, learning_rate=2e-3, ema=0.998, muon=True)
    student: StudentSettings = StudentSettings(budget_s=700.0, learning_rate=3e-4, ema=0.99, muon=True)
    matching: MatchingSettings = MatchingSettings(budget_s=600.0, learning_rate=1e-4, ema=0.99, muon=True)

    def __post_init__(self) -> None:
        if self.autoencoder.keep and self.start is None:
            raise ValueError("autoencoder.keep keeps the codec of a start; name one")
        if self.student.target == "start" and self.start is None:
            raise ValueError('student.target = "start" keeps to what a start says; name one')
        if self.student.target == "start" and self.matching.on:
            raise ValueError('matching wants a teacher, and student.target = "start" has none; choose one')


@dataclass(frozen=True, config=_STRICT)
class LoraSettings:
    """rank: width of the thin layers; 0 trains every weight instead. alpha / rank: how much of them is added."""

    rank: Annotated[int, Field(ge=0)] = 0
    alpha: Rate = 32.0


@dataclass(frozen=True, config=_STRICT)
class WanStageSettings(StageSettings):
    """batch: clips a step, over all processes. guidance, target: of the student's stage, as in `StudentSettings`."""

    batch: Count = 8
    guidance: Annotated[float, Field(ge=1)] = 3.0
    target: Target = "endpoint"


def wan_config() -> ModelConfig:
    """The shape of Wan 2.1 at 1.3 billion weights, chunk by chunk."""
    return ModelConfig(
        name="wan",
        width=832,
        height=480,
        chunk=3,
        prompt_limit=1000,
        examples=WAN_EXAMPLES,
        student=WAN_SMALL,
        codec=CodecConfig(latent_channels=16, spatial_stride=8, first_alone=True),
        text=TextConfig(length=512),
        sampler=SamplerConfig(shift=5.0),
        cache=CacheConfig(sink=3, window=18),
        regions=RegionConfig(carry="clean"),
    )


@dataclass(frozen=True, config=_STRICT)
class WanSettings:
    """One run of a Wan model.

    data: encoded clips (`precomputed.py`). transformer: a folder in diffusers' layout to begin from; without it from
    nothing. beside: a model folder whose codec and text encoder complete the export; without it, the transformer alone.
    precision: of the passes. checkpointing: compute layers again on the way back, for a part of the memory.
    """

    model: ModelConfig = field(default_factory=wan_config)
    data: Path = Path("data")
    transformer: Path | None = None
    beside: Path | None = None
    lora: LoraSettings = LoraSettings()
    precision: Literal["bf16", "fp32"] = "bf16"
    checkpointing: bool = True
    seed: Annotated[int, Field(ge=0)] = 0
    teacher: WanStageSettings = WanStageSettings(budget_s=6 * 3600.0, learning_rate=2e-5, save_s=900.0)
    student: WanStageSettings = WanStageSettings(budget_s=3 * 3600.0, learning_rate=1e-5, ema=0.99, save_s=900.0)

    def __post_init__(self) -> None:
        if self.lora.rank and self.transformer is None:
            raise ValueError("lora adapts weights that are there; name a transformer to begin from")
        if self.lora.rank and (self.teacher.muon or self.student.muon):
            raise ValueError("muon is for the matrices between layers, which lora leaves as they are; choose one")
        if self.model.sampler.prediction == "gated":
            raise ValueError("a Wan model has no gate; choose the prediction flow or clean")
        if self.model.sampler.prediction == "mean_flow":
            raise ValueError("a mean flow is not trained here; choose the prediction flow or clean")


def load_settings(path: Path) -> TrainSettings | WanSettings:
    """Read a TOML file over its recipe's defaults.

    Raises PipelineError: `train_config_missing`, `train_config_invalid`; for what a Wan run names, also
    `config_missing`, `config_invalid`, `weights_missing`, `weights_mismatch`.
    """
    if not path.is_file():
        raise PipelineError("train_config_missing", f"There is no file {path}.", "Name a TOML file, or leave it out.")
    try:
        given = tomllib.loads(path.read_text())
        match given.pop("recipe", "pocket"):
            case "pocket":
                return TypeAdapter(TrainSettings).validate_python(_over(asdict(TrainSettings()), given))
            case "wan":
                return TypeAdapter(WanSettings).validate_python(_over(_told_by_folders(given), given))
            case other:
                raise PipelineError(
                    "train_config_invalid", f"{path}: there is no recipe {other!r}.", 'Choose "pocket" or "wan".'
                )
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PipelineError("train_config_invalid", f"{path} is not TOML: {error}.", "Correct that line.") from error
    except ValidationError as error:
        place, said = _first(error)
        raise PipelineError("train_config_invalid", f"{path}: {place}: {said}.", "Correct that key.") from error
    except UnknownKeyError as error:
        raise PipelineError(
            "train_config_invalid",
            f"{path}: there is no key {error.name!r}{f' in [{error.table}]' if error.table else ''}.",
            f"Known there: {', '.join(error.known)}.",
        ) from error


def _told_by_folders(given: Mapping[str, Any]) -> dict[str, Any]:
    """A Wan run's defaults, with the model as the named folders have it."""
    told = asdict(WanSettings())
    if isinstance(beside := given.get("beside"), str):
        told["model"] = asdict(load_config(Path(beside) / "config.json"))
    if isinstance(transformer := given.get("transformer"), str):
        shape = read_transformer_shape(Path(transformer))
        if shape["gate_value"] is not None:
            raise not_ours(Path(transformer), "it has AnyFlow's modules, which are not trained here")
        told["model"]["student"] |= shape
    return told


def read_budget(text: str) -> float:
    """'90s', '20m' or '1.5h' in seconds. Raises PipelineError `budget_invalid`."""
    try:
        return TypeAdapter(Seconds).validate_python(text)
    except ValidationError as error:
        raise PipelineError(
            "budget_invalid", f"A budget of {text!r} trains nothing.", "Give a positive time like 90s, 20m or 1.5h."
        ) from error


class UnknownKeyError(Exception):
    def __init__(self, name: str, table: str, known: list[str]) -> None:
        super().__init__(name)
        self.name, self.table, self.known = name, table, known


def _over(known: dict[str, Any], given: Mapping[str, Any], table: str = "") -> dict[str, Any]:
    """The known values with the given ones over them; `budget` stands for `budget_s`."""
    merged = dict(known)
    for name, value in given.items():
        key = "budget_s" if name == "budget" and "budget_s" in known else name
        if key not in known:
            raise UnknownKeyError(name, table, sorted("budget" if name == "budget_s" else name for name in known))
        inner = isinstance(known[key], dict) and isinstance(value, Mapping)
        merged[key] = _over(known[key], value, f"{table}.{name}".lstrip(".")) if inner else value
    return merged


def _first(error: ValidationError) -> tuple[str, str]:
    first = error.errors()[0]
    return ".".join(str(part) for part in first["loc"]) or "the file", first["msg"]
