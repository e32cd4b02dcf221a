"""The generator: weights and the one verb `step`. Read this file first.

A step is one chunk: encode the source if there is one -> denoise passes with the cache frozen -> cache pass on the
clean latents, which writes keys and values -> decode. The engine owns no stream: all memory is in the StreamState.
With regions, a `Plan` says which tiles are computed: their columns take the same way, and what is held fills them up.
"""

import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.chunk import Chunk, Controls
from pipeline.codec import CodecMemory, PocketCodec, pixels_to_frames, to_bytes
from pipeline.config import ModelConfig
from pipeline.errors import PipelineError
from pipeline.kv_cache import KVCache
from pipeline.plan import Plan
from pipeline.region_cache import RegionAttention, RegionCache
from pipeline.sampler import denoise, draw_noise, levels, levels_from
from pipeline.state import StreamState
from pipeline.step_cache import StepCache
from pipeline.structure import structure
from pipeline.student import CachedAttention, Student
from pipeline.text import TextEncoder
from pipeline.tiles import Tiles
from pipeline.weights import load_parts, pocket_folder

PAINTED = re.compile("[01]*1[01]*")

Trace = Callable[[str], AbstractContextManager[object]]


def no_trace(stage: str) -> AbstractContextManager[object]:
    return nullcontext()


class Engine:
    """Weights on one device. `trace(stage)` is entered around each stage; whoever wants times brings a clock."""

    def __init__(
        self,
        config: ModelConfig,
        codec: PocketCodec,
        text: TextEncoder,
        student: Student,
        *,
        device: str = "cpu",
        trace: Trace = no_trace,
        step_cache: float = 0.0,
    ) -> None:
        self.config, self.device, self.trace = config, torch.device(device), trace
        self.step_cache = step_cache  # threshold of `StepCache`, for schedules of many passes; 0 computes each
        self.codec = codec.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.text = text.to(self.device)
        self.student = student.to(self.device)

    @classmethod
    def load(
        cls, model: Path | None = None, *, device: str = "cpu", threads: int | None = None, trace: Trace = no_trace
    ) -> "Engine":
        """Load a model folder; None is the embedded pocket student. Raises PipelineError (see `weights.load_parts`)."""
        if threads is not None:
            torch.set_num_threads(threads)
        return cls(*load_parts(model or pocket_folder()), device=device, trace=trace)

    def warm_up(self) -> None:
        """Run every stage, so that the first viewer does not pay for allocations."""
        state = self.open(seed=0)
        source = np.zeros((self.config.frames_per_chunk, self.config.height, self.config.width, 3), np.uint8)
        for frames in (None, source, None):
            self.step(state, Controls(prompt="warm up", seed=0), frames)

    def open(self, seed: int) -> StreamState:
        cache = KVCache.of(self.config, device=self.device)
        regions = RegionCache(self.config, device=self.device) if self.config.tiles else None
        return StreamState(cache, CodecMemory(), CodecMemory(), seed, regions=regions)

    def reset(self, state: StreamState, seed: int) -> None:
        """Forget the stream, in place: what follows equals a fresh `open(seed)`."""
        state.reset(seed)

    @torch.inference_mode()
    def step(self, state: StreamState, controls: Controls, source_THWC: np.ndarray | None = None) -> Chunk:
        """Make the next chunk of a stream.

        source_THWC: uint8 RGB, exactly `frames_per_chunk` pictures of the model's size, or None.
        A new seed starts the stream again. Raises PipelineError: `prompt_invalid`, `prompt_too_long`, `seed_invalid`,
        `strength_invalid`, `structure_invalid`, `regions_invalid`, `paint_invalid`, `source_invalid`.
        """
        self.check(controls, source_THWC)
        if controls.seed != state.seed:
            state.reset(controls.seed)
        with self.trace("text"):
            self._read_prompt(state, controls.prompt)
        with self.trace("encode"):
            frames_TCHW = (
                None if source_THWC is None else pixels_to_frames(torch.from_numpy(source_THWC).to(self.device))
            )
            sigmas = levels(self.config.sampler)
            if frames_TCHW is not None:
                sigmas = levels_from(self.config.sampler, controls.strength)
            plan = self._plan(state, controls, sigmas, frames_TCHW)
            source, control = None, None
            if frames_TCHW is not None:
                source, control = self._encode(state, controls, frames_TCHW, plan)
        clean = self._denoise(state, sigmas, source, control, plan)
        with self.trace("decode"):
            whole, frames_TCHW = self._decode(state, clean, plan)
        with self.trace("convert"):
            pixels = frames_TCHW.permute(0, 2, 3, 1).contiguous().cpu().numpy()
            chunk = Chunk(state.index, controls.epoch, pixels, whole[0].cpu().numpy())
            if plan is not None:
                chunk = replace(chunk, active_HW=plan.mask_HW, refreshed_HW=plan.refreshed_HW)
        state.index += 1
        return chunk

    def check(self, controls: Controls, source_THWC: np.ndarray | None) -> None:
        """Refuse what `step` cannot take, before anything of the stream changes."""
        prompt, limit = controls.prompt, self.config.prompt_limit
        if not isinstance(prompt, str):
            kind = type(prompt).__name__
            raise PipelineError("prompt_invalid", f"A prompt is text, not {kind}.", "Send the prompt as a string.")
        if len(prompt) > limit:
            raise PipelineError(
                "prompt_too_long", f"The prompt has {len(prompt)} characters; {limit} are allowed.", "Shorten it."
            )
        if not isinstance(controls.seed, int) or not 0 <= controls.seed < 2**31:
            raise PipelineError(
                "seed_invalid", f"The seed {controls.seed!r} is not in 0 to 2147483647.", "Choose a seed in that range."
            )
        if not isinstance(controls.strength, int | float) or not 0 <= controls.strength <= 1:
            raise PipelineError(
                "strength_invalid", f"The strength {controls.strength!r} is not in 0 to 1.", "Choose one in that range."
            )
        if not isinstance(controls.structure, int | float) or not 0 <= controls.structure <= 1:
            raise PipelineError(
                "structure_invalid",
                f"The structure {controls.structure!r} is not in 0 to 1.",
                "Choose one in that range.",
            )
        if not isinstance(controls.regions, int | float) or not 0 <= controls.regions <= 1:
            raise PipelineError(
                "regions_invalid", f"The regions dial {controls.regions!r} is not in 0 to 1.", "Choose a value there."
            )
        painted, tiles = controls.paint, self.config.tiles
        whole = isinstance(painted, str) and (not painted or PAINTED.fullmatch(painted) is not None)
        if whole and painted and tiles:  # a model without tiles computes all, whatever is painted
            whole = len(painted) == tiles[0] * tiles[1]
        if not whole:
            raise PipelineError(
                "paint_invalid",
                f"The painted mask {str(painted)[:80]!r} is not one 0 or 1 for each tile, with a 1 somewhere.",
                "Send them row by row, or an empty mask for none.",
            )
        expected = (self.config.frames_per_chunk, self.config.height, self.config.width, 3)
        if source_THWC is not None and (source_THWC.shape != expected or source_THWC.dtype != np.uint8):
            raise PipelineError(
                "source_invalid",
                f"The source is {source_THWC.dtype} {source_THWC.shape}; the model takes uint8 {expected}.",
                "Crop and resize the pictures first.",
            )

    def _read_prompt(self, state: StreamState, prompt: str) -> None:
        if prompt != state.prompt:
            tokens = self.text.tokenize([prompt]).to(self.device)
            state.text = self.student.text_kv(self.text(tokens))
            state.prompt = prompt

    def _plan(
        self, state: StreamState, controls: Controls, sigmas: list[float], frames_TCHW: Tensor | None
    ) -> Plan | None:
        """Which tiles to compute; None: no regions are asked for, or this model cannot hold any."""
        if state.regions is None or not (controls.regions or controls.paint):
            if state.regions is not None and state.regions.ready:
                state.regions.reset()
                state.encoder.layers.reset()
                state.decoder.layers.reset()
            return None
        if frames_TCHW is None:
            state.encoder.layers.reset()  # a source that comes back is another one
        key = (controls.prompt, tuple(sigmas), controls.structure, frames_TCHW is None)
        plan = Plan.begin(state.regions, controls.regions, controls.paint, key, frames_TCHW)
        if plan.anew and plan.tiles is not None:
            state.regions.forget(plan.tiles.tokens(self.config.grid), state.cache.written)
        return plan

    def _encode(
        self, state: StreamState, controls: Controls, frames_TCHW: Tensor, plan: Plan | None
    ) -> tuple[Tensor, Tensor | None]:
        """The source's latents and, where it is asked for and known, its structure."""
        if plan is None:
            latents = self.codec.encode_push(state.encoder, frames_TCHW)
            assert latents is not None, "a chunk of frames fills its latent frames"
        else:
            latents = self.codec.encode_tiles(state.encoder, frames_TCHW, plan.tiles)
        if not (controls.structure and self.config.student.control_channels):
            return latents[None], None
        codec = self.config.codec
        edges = controls.structure * structure(frames_TCHW, codec.frames, codec.spatial_stride)[None]
        return latents[None], edges if plan is None or plan.tiles is None else plan.tiles.gather(edges)

    def _denoise(
        self, state: StreamState, sigmas: list[float], source: Tensor | None, control: Tensor | None, plan: Plan | None
    ) -> Tensor:
        """Denoise passes, then the cache pass. Returns clean latents (1, T, C, h, w), a column of the planned tiles."""
        config, text = self.config, state.text
        assert text is not None, "the prompt is read before the first pass"
        shape = (1, config.chunk, config.codec.latent_channels, *config.latent_size)
        attend = CachedAttention(state.cache, self.student, config.grid, config.chunk)
        if plan is not None:
            attend = RegionAttention(state.cache, self.student, config.grid, config.chunk, plan.regions, sigmas)
        # Regions keep the keys of every pass, so none is left out with them.
        cached = StepCache(self.student, self.step_cache, len(sigmas)) if self.step_cache and plan is None else None

        def passes(first: int, last: int | None, start: Tensor | None, tiles: Tiles | None) -> Tensor:
            def noise(step: int) -> Tensor:
                drawn = draw_noise(shape, state.seed, state.index, first + step).to(self.device)
                return drawn if tiles is None else tiles.gather(drawn)

            def student(noisy: Tensor, sigma: float, step: int) -> Tensor:
                with self.trace(f"denoise_{first + step}"):
                    if isinstance(attend, RegionAttention):
                        attend.step = first + step
                        attend.choose(tiles)
                    timesteps = torch.full((1, 1), 1000 * sigma, device=self.device)
                    if cached is not None:
                        return cached(noisy, timesteps, text, attend, control)
                    return self.student(noisy, timesteps, text, attend, control, tiles)

            return denoise(student, noise, sigmas[first:last], start, config.sampler.prediction)

        if plan is None or not plan.probing:
            clean = passes(0, None, source, plan.tiles if plan else None)
        else:
            probe = passes(0, 1, None, None)
            plan.see(probe[0])
            clean = passes(1, None, probe if plan.tiles is None else plan.tiles.gather(probe), plan.tiles)
            while plan.spreads(clean):
                clean = passes(1, None, probe if plan.tiles is None else plan.tiles.gather(probe), plan.tiles)
        with self.trace("cache"):
            tiles = plan.tiles if plan else None
            if isinstance(attend, RegionAttention):
                attend.choose(tiles)
            attend.writing = True
            self.student(clean, torch.zeros(1, 1, device=self.device), text, attend, control, tiles)
            state.cache.commit(config.chunk)
        return clean

    def _decode(self, state: StreamState, clean: Tensor, plan: Plan | None) -> tuple[Tensor, Tensor]:
        """Whole clean latents and their pictures (T, 3, H, W), uint8."""
        if plan is None:
            return clean, to_bytes(self.codec.decode_push(state.decoder, clean[0]))
        whole, drawn = plan.keep(clean)
        pictures = to_bytes(self.codec.decode_tiles(state.decoder, whole[0], drawn))
        faded = None if plan.refreshed_HW is None else Tiles.of(plan.refreshed_HW, self.device)
        return whole, plan.regions.show(pictures, drawn, faded)
