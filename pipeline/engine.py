"""The generator: weights and the one verb `step`. Read this file first.

A step is one chunk: encode the source if there is one -> denoise passes with the cache frozen -> cache pass on the
clean latents, which writes keys and values -> decode. The engine owns no stream: all memory is in the StreamState.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.chunk import Chunk, Controls
from pipeline.codec import CodecMemory, PocketCodec, frames_to_pixels, pixels_to_frames
from pipeline.config import ModelConfig
from pipeline.errors import PipelineError
from pipeline.kv_cache import KVCache
from pipeline.sampler import denoise, draw_noise, levels, levels_from
from pipeline.state import StreamState
from pipeline.structure import structure
from pipeline.student import CachedAttention, Student
from pipeline.text import TextEncoder
from pipeline.weights import load_parts, pocket_folder

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
    ) -> None:
        self.config, self.device, self.trace = config, torch.device(device), trace
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
        return StreamState(cache, CodecMemory(), CodecMemory(), seed)

    def reset(self, state: StreamState, seed: int) -> None:
        """Forget the stream, in place: what follows equals a fresh `open(seed)`."""
        state.reset(seed)

    @torch.inference_mode()
    def step(self, state: StreamState, controls: Controls, source_THWC: np.ndarray | None = None) -> Chunk:
        """Make the next chunk of a stream.

        source_THWC: uint8 RGB, exactly `frames_per_chunk` pictures of the model's size, or None.
        A new seed starts the stream again. Raises PipelineError: `prompt_invalid`, `prompt_too_long`, `seed_invalid`,
        `strength_invalid`, `structure_invalid`, `source_invalid`.
        """
        self.check(controls, source_THWC)
        if controls.seed != state.seed:
            state.reset(controls.seed)
        with self.trace("text"):
            self._read_prompt(state, controls.prompt)
        with self.trace("encode"):
            source, control = (None, None) if source_THWC is None else self._encode(state, controls, source_THWC)
        clean = self._denoise(state, controls, source, control)
        with self.trace("decode"):
            frames_TCHW = self.codec.decode_push(state.decoder, clean[0])
        with self.trace("convert"):
            pixels = frames_to_pixels(frames_TCHW).cpu().numpy()
            chunk = Chunk(state.index, controls.epoch, pixels, clean[0].cpu().numpy())
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

    def _encode(self, state: StreamState, controls: Controls, source_THWC: np.ndarray) -> tuple[Tensor, Tensor | None]:
        """The source's latents and, where it is asked for and known, its structure."""
        frames_TCHW = pixels_to_frames(torch.from_numpy(source_THWC).to(self.device))
        latents = self.codec.encode_push(state.encoder, frames_TCHW)
        assert latents is not None, "a chunk of frames fills its latent frames"
        if not (controls.structure and self.config.student.control_channels):
            return latents[None], None
        codec = self.config.codec
        return latents[None], controls.structure * structure(frames_TCHW, codec.frames, codec.spatial_stride)[None]

    def _denoise(self, state: StreamState, controls: Controls, source: Tensor | None, control: Tensor | None) -> Tensor:
        """Denoise passes, then the cache pass. Returns clean latents (1, T, C, h, w)."""
        config, text = self.config, state.text
        assert text is not None, "the prompt is read before the first pass"
        shape = (1, config.chunk, config.codec.latent_channels, *config.latent_size)
        attend = CachedAttention(state.cache, self.student, config.grid, config.chunk)

        def noise(step: int) -> Tensor:
            return draw_noise(shape, state.seed, state.index, step).to(self.device)

        def student(noisy: Tensor, sigma: float, step: int) -> Tensor:
            with self.trace(f"denoise_{step}"):
                timesteps = torch.full((1, 1), 1000 * sigma, device=self.device)
                return self.student(noisy, timesteps, text, attend, control)

        sigmas = levels(config.sampler) if source is None else levels_from(config.sampler, controls.strength)
        clean = denoise(student, noise, sigmas, source, config.sampler.prediction)
        with self.trace("cache"):
            attend.writing = True
            self.student(clean, torch.zeros(1, 1, device=self.device), text, attend, control)
            state.cache.commit(config.chunk)
        return clean
