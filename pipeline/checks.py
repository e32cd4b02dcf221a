"""Whether Controls and a source can be drawn at all, before anything of the stream changes. Knows no stream."""

import re
from typing import get_args

import numpy as np

from pipeline.chunk import Controls
from pipeline.config import MOST_STEPS, ModelConfig, Transition
from pipeline.errors import PipelineError

PAINTED = re.compile("[01]*1[01]*")
LONGEST_GLIDE = 64
STRONGEST_LORA = 4.0


def check(config: ModelConfig, controls: Controls, source_THWC: np.ndarray | None, index: int) -> None:
    """Raises PipelineError, one of the codes that `Engine.step` names. index: of the chunk to come."""
    _check_prompt(controls, config)
    if not isinstance(controls.seed, int) or not 0 <= controls.seed < 2**31:
        raise PipelineError(
            "seed_invalid", f"The seed {controls.seed!r} is not in 0 to 2147483647.", "Choose a seed in that range."
        )
    if not _within(controls.strength, 1):
        raise PipelineError(
            "strength_invalid", f"The strength {controls.strength!r} is not in 0 to 1.", "Choose one in that range."
        )
    if not _within(controls.structure, 1):
        raise PipelineError(
            "structure_invalid", f"The structure {controls.structure!r} is not in 0 to 1.", "Choose one in that range."
        )
    if not _within(controls.regions, 1):
        raise PipelineError(
            "regions_invalid", f"The regions dial {controls.regions!r} is not in 0 to 1.", "Choose a value there."
        )
    _check_paint(controls.paint, config)
    _check_steps(controls.steps, config)
    if controls.lora and controls.lora not in config.loras:
        known = f"Choose one of {', '.join(config.loras)}." if config.loras else "Start again with --lora FILE."
        raise PipelineError("lora_unknown", f"No low-rank weights {str(controls.lora)[:80]!r} were loaded.", known)
    if not _within(controls.lora_strength, STRONGEST_LORA):
        raise PipelineError(
            "lora_invalid",
            f"The strength of low-rank weights {controls.lora_strength!r} is not in 0 to {STRONGEST_LORA:g}.",
            "Choose one in that range; 1 is as they were trained.",
        )
    if not isinstance(controls.motion_aware, bool | None):
        raise PipelineError(
            "motion_aware_invalid",
            f"Motion-aware is true or false, not {str(controls.motion_aware)[:80]!r}.",
            "Choose one, or none for the model's own.",
        )
    counts = {config.frames_per_chunk, config.pictures(index)}
    if source_THWC is not None and (
        source_THWC.dtype != np.uint8
        or source_THWC.shape not in [(count, config.height, config.width, 3) for count in counts]
    ):
        expected = (config.pictures(index), config.height, config.width, 3)
        raise PipelineError(
            "source_invalid",
            f"The source is {source_THWC.dtype} {source_THWC.shape}; the model takes uint8 {expected}.",
            "Crop and resize the pictures first.",
        )


def _within(value: object, most: float) -> bool:
    return isinstance(value, int | float) and 0 <= value <= most


def _check_prompt(controls: Controls, config: ModelConfig) -> None:
    prompt, limit = controls.prompt, config.prompt_limit
    if not isinstance(prompt, str):
        kind = type(prompt).__name__
        raise PipelineError("prompt_invalid", f"A prompt is text, not {kind}.", "Send the prompt as a string.")
    if len(prompt) > limit:
        raise PipelineError(
            "prompt_too_long", f"The prompt has {len(prompt)} characters; {limit} are allowed.", "Shorten it."
        )
    if controls.transition not in get_args(Transition):
        raise PipelineError(
            "transition_invalid",
            f"A prompt cannot come in by {str(controls.transition)[:80]!r}.",
            f"Choose one of {', '.join(get_args(Transition))}.",
        )
    if not isinstance(controls.glide_chunks, int) or not 1 <= controls.glide_chunks <= LONGEST_GLIDE:
        raise PipelineError(
            "transition_invalid",
            f"A glide of {controls.glide_chunks!r} chunks is not in 1 to {LONGEST_GLIDE}.",
            "Choose one in that range.",
        )


def _check_paint(painted: str, config: ModelConfig) -> None:
    tiles = config.tiles
    whole = isinstance(painted, str) and (not painted or PAINTED.fullmatch(painted) is not None)
    if whole and painted and tiles:  # a model without tiles computes all, whatever is painted
        whole = len(painted) == tiles[0] * tiles[1]
    if not whole:
        raise PipelineError(
            "paint_invalid",
            f"The painted mask {str(painted)[:80]!r} is not one 0 or 1 for each tile, with a 1 somewhere.",
            "Send them row by row, or an empty mask for none.",
        )


def _check_steps(steps: int, config: ModelConfig) -> None:
    if not isinstance(steps, int) or not 0 <= steps <= MOST_STEPS:
        raise PipelineError(
            "steps_invalid",
            f"{steps!r} denoise passes are not in 1 to {MOST_STEPS}.",
            "Choose one in that range, or 0 for the model's own.",
        )
    if steps and (told := untrained(config, steps)):
        raise PipelineError("steps_invalid", told, "Leave it at 0, the model's own.")


def untrained(config: ModelConfig, steps: int) -> str:
    """That a model does not know so many denoise passes, in a sentence; empty if it does."""
    own = len(config.sampler.steps)
    if config.sampler.any_steps or steps == own:
        return ""
    return f"{config.name} was made for {own} denoise passes and knows no other number."
