"""A folder of one's own as a row of the table: what the trainer exported, or a checkpoint that was converted.

A transformer draws with the parts that all students on Wan share, by the rule that lies beside it or by that of a
family; a whole model folder brings its own. Knows no network and no torch.
"""

import os.path
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pipeline.bases import BASES
from pipeline.config import CacheConfig, CodecConfig, ModelConfig, SamplerConfig, StudentConfig, load_config
from pipeline.errors import PipelineError
from pipeline.family import WAN_SIZE, Family
from pipeline.layout import RULE, difference_of_shape, recorded, transformer_in
from pipeline.models import FAMILIES


@dataclass(frozen=True, kw_only=True)
class Own(Family):
    """The row of a folder. Of layout "pocket" it is a whole model, of layout "wan" a transformer alone, on any base."""

    folder: Path
    """What is loaded."""
    told: ModelConfig
    """How it is run, at the size that it was made for."""

    @property
    def shape(self) -> StudentConfig:
        return self.told.student

    @property
    def sampler(self) -> SamplerConfig:
        return self.told.sampler

    @property
    def cache(self) -> CacheConfig:
        return self.told.cache

    @property
    def needs_consent(self) -> bool:
        """Nobody asks for a licence of one's own."""
        return False

    def config(self, width: int, height: int) -> ModelConfig:
        return replace(self.told, width=width, height=height)


def own(folder: Path, like: Family | None = None) -> Own:
    """The row of a folder, or of the transformer in it. like: the family that it is run as, if it does not say itself.

    Raises PipelineError: `model_unknown`, `model_not_served`, `config_missing`, `config_invalid`, `weights_missing`,
    `weights_mismatch`.
    """
    place, name = transformer_in(folder), own_name(folder)
    if place is None:
        return _row(name, folder, load_config(folder / "config.json"), "pocket", "pocket", "a model folder")
    if (place / RULE).is_file():
        told, remedy = load_config(place / RULE), f"Take the {RULE} that it was exported or converted with."
    elif like is not None:
        told, remedy = rule_of(like, name), _families_for(place)
    else:
        raise PipelineError(
            "config_missing", f"{place} does not say how it is run: it has no {RULE}.", _families_for(place)
        )
    if differs := difference_of_shape(place, told.student):
        what = like.name if like and not (place / RULE).is_file() else RULE
        raise PipelineError("weights_mismatch", f"{place} does not fit {what}: {differs}.", remedy)
    return _row(name, place, told, _base(place, told), "wan", _origin(place))


def own_name(folder: Path) -> str:
    """That of the folder; of one that is called transformer, that of the folder around it."""
    path = Path(os.path.abspath(folder))
    return path.parent.name if path.name == "transformer" else path.name


def rule_of(like: Family, name: str) -> ModelConfig:
    """How a student of one's own is run as that family. Raises PipelineError (`model_not_served`)."""
    if like.layout != "wan":
        raise PipelineError(
            "model_not_served", f"No student of your own is run like {like.name}.", f"Choose one of {_joined()}."
        )
    return replace(like.config(*WAN_SIZE), name=name)


def _families_for(place: Path) -> str:
    """What to do next, for a transformer without a rule."""
    if those := _joined(place):
        return f"Add --like and the family that it is run as: {those}."
    return f"No family has its shape; export it with `stillstream train`, which writes {RULE}."


def _joined(place: Path | None = None) -> str:
    """The names of families on Wan, those whose shape a transformer has."""
    fitting = (row for row in FAMILIES if row.layout == "wan")
    return ", ".join(row.name for row in fitting if place is None or not difference_of_shape(place, row.shape))


def _base(place: Path, told: ModelConfig) -> str:
    """The base whose parts complete the transformer: that of its shape, or any on the same latents and text."""
    wants = asdict(told.codec) | {"text_dim": told.student.text_dim}
    differs = ""
    for key, base in sorted(BASES.items(), key=lambda item: item[1].shape != told.student):
        if not base.parts:
            continue
        codec = CodecConfig(
            latent_channels=base.channels, spatial_stride=base.stride, first_alone=True, widths=told.codec.widths
        )
        has = asdict(codec) | {"text_dim": base.shape.text_dim}
        if wants == has:
            return key
        differs = differs or next(
            f"{name} is {wants[name]}, theirs is {has[name]}" for name in has if wants[name] != has[name]
        )
    raise PipelineError(
        "model_not_served",
        f"{place} cannot draw with Wan's text encoder and autoencoder: {differs}.",
        "Name the model folder that it belongs to.",
    )


def _origin(place: Path) -> str:
    source = recorded(place).get("source")
    if not isinstance(source, dict):
        return "a transformer without a record"
    return f"converted from {source['name']}" if "name" in source else "trained"


def _row(name: str, folder: Path, told: ModelConfig, base: str, layout: str, origin: str) -> Own:
    sampler, cache = told.sampler, told.cache
    return Own(
        name=name,
        title=name,
        base=base,
        source=origin,
        licence="yours to know",
        commercial=None,
        layout="pocket" if layout == "pocket" else "wan",
        prediction="mean_flow" if sampler.prediction == "mean_flow" else "flow",
        steps=sampler.steps,
        first_steps=sampler.first_steps,
        shift=sampler.shift,
        any_steps=sampler.any_steps,
        chunk=told.chunk,
        first_chunk=told.first_chunk,
        attends=cache.sink + cache.coarse + cache.window + told.chunk,
        sink=cache.sink,
        coarse=cache.coarse,
        positions=cache.positions,
        clean_pass=cache.clean_pass,
        sink_keeps=cache.sink_keeps,
        rewrites=cache.rewrites,
        past_weight=cache.past_weight,
        transition=told.transition,
        folder=folder,
        told=told,
    )
