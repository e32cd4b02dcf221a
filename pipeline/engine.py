"""The generator: weights and the one verb `step`. Read this file first.

A step is one chunk: encode the source if there is one -> denoise passes with the cache frozen -> cache pass on the
clean latents, which writes keys and values -> decode. The engine owns no stream: all memory is in the StreamState.
With regions, a `Plan` says which tiles are computed: their columns take the same way, and what is held fills them up.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.adapters import Adapter, Wardrobe, read_adapters
from pipeline.attention import CachedAttention
from pipeline.checks import check
from pipeline.chunk import Chunk, Controls
from pipeline.codec import Codec, PocketCodec, from_bytes, multiplies_bfloat16, pixels_to_frames, to_bytes
from pipeline.config import ModelConfig, WanModel
from pipeline.kv_cache import KVCache
from pipeline.plan import Plan
from pipeline.region_cache import RegionAttention, RegionCache
from pipeline.sampler import Anchor, denoise, draw_noise, ends, from_noise, levels, levels_from, lowered, shut
from pipeline.state import StreamState, last_before
from pipeline.step_cache import StepCache
from pipeline.structure import structure
from pipeline.student import Modulations, Student
from pipeline.text import Text
from pipeline.tiles import Tiles
from pipeline.wan import load_wan
from pipeline.weights import config_of, load_parts, pocket_folder
from pipeline.wording import PastLatents, coarsen, recache

Trace = Callable[[str], AbstractContextManager[object]]


def no_trace(stage: str) -> AbstractContextManager[object]:
    return nullcontext()


class Engine:
    """Weights on one device. `trace(stage)` is entered around each stage; whoever wants times brings a clock."""

    def __init__(
        self,
        config: ModelConfig,
        codec: Codec,
        text: Text,
        student: Student,
        *,
        device: str = "cpu",
        trace: Trace = no_trace,
        adapters: Mapping[str, Adapter] | None = None,
        lora_strength: float = 1.0,
        step_cache: float = 0.0,
    ) -> None:
        self.device, self.trace = torch.device(device), trace
        self.step_cache = step_cache  # threshold of `StepCache`, for schedules of many passes; 0 computes each
        self.codec = codec.place(self.device)
        self.text = text.place(self.device)
        self.student = student.to(self.device)
        self.wardrobe = Wardrobe(self.student, adapters or {})
        self._level = lru_cache(maxsize=32)(self._level_of)  # chunk by chunk the passes have the same levels
        self.config = replace(config, loras=tuple(self.wardrobe.adapters), lora_strength=lora_strength)

    @classmethod
    def load(
        cls,
        model: Path | WanModel | None = None,
        *,
        device: str = "cpu",
        threads: int | None = None,
        trace: Trace = no_trace,
        loras: Sequence[Path] = (),
        lora_strength: float = 1.0,
    ) -> "Engine":
        """Load a model folder or a Wan model; None is the embedded pocket student. loras: low-rank weights to wear.

        These are read first, so that a wrong file is told before anything large is loaded.
        Raises PipelineError (see `weights.load_parts`, `wan.load_wan` and `adapters.read_adapters`).
        """
        if threads is not None:
            torch.set_num_threads(threads)
        adapters = read_adapters(loras, config_of(model).student)
        parts = load_wan(model, device) if isinstance(model, WanModel) else load_parts(model or pocket_folder())
        config, codec, text, student = parts
        if device == "cpu" and isinstance(codec, PocketCodec) and multiplies_bfloat16():
            codec.narrow()
        return cls(
            config, codec, text, student, device=device, trace=trace, adapters=adapters, lora_strength=lora_strength
        )

    def warm_up(self) -> None:
        """Run every stage, so that the first viewer does not pay for allocations."""
        state = self.open(seed=0)
        source = np.zeros((self.config.frames_per_chunk, self.config.height, self.config.width, 3), np.uint8)
        for frames in (None, source, None):
            self.step(state, Controls(prompt="warm up", seed=0), frames)

    def open(self, seed: int) -> StreamState:
        config, dtype = self.config, self.student.dtype
        cache = KVCache.of(config, device=self.device, dtype=dtype)
        past = PastLatents(cache, (config.codec.latent_channels, *config.latent_size), self.device)
        regions = RegionCache(config, device=self.device, dtype=dtype) if config.tiles else None
        state = StreamState(cache, self.codec.remember(), self.codec.remember(), seed, past=past, regions=regions)
        state.drawn_HW = torch.zeros(config.latent_size, dtype=torch.int64, device=self.device)
        return state

    def reset(self, state: StreamState, seed: int) -> None:
        """Forget the stream, in place: what follows equals a fresh `open(seed)`."""
        state.reset(seed)

    @torch.inference_mode()
    def step(self, state: StreamState, controls: Controls, source_THWC: np.ndarray | None = None) -> Chunk:
        """Make the next chunk of a stream.

        source_THWC: uint8 RGB, `frames_per_chunk` pictures of the model's size, or None. Of a model whose first chunk
        is shorter, the oldest of them are left out there; that chunk also takes as many as it shows.
        A new seed starts the stream again. Raises PipelineError: `prompt_invalid`, `prompt_too_long`,
        `transition_invalid`, `seed_invalid`, `strength_invalid`, `structure_invalid`, `regions_invalid`,
        `paint_invalid`, `steps_invalid`, `lora_unknown`, `lora_invalid`, `motion_aware_invalid`, `source_invalid`.
        """
        check(self.config, controls, source_THWC, state.index if controls.seed == state.seed else 0)
        if controls.seed != state.seed:
            state.reset(controls.seed)
        with self.trace("text"):
            self._read_prompt(state, controls)
        with self.trace("encode"):
            frames_TCHW = None if source_THWC is None else self._pictures(source_THWC, state.index)
            if frames_TCHW is None or controls.source != state.source:  # a source that comes back is another one, too
                state.encoder.reset()
                state.noise.reset()
            state.source = controls.source
            asked = self._schedule(state, controls, frames_TCHW)
            sigmas = lowered(asked, self._less(state, controls, frames_TCHW))
            plan = self._plan(state, controls, asked, frames_TCHW)
            source, control = None, None
            if frames_TCHW is not None:
                source, control = self._encode(state, controls, frames_TCHW, plan)
        clean = self._denoise(state, sigmas, source, control, plan)
        state.drawn(None if plan is None else plan.tiles)
        with self.trace("decode"):
            whole, frames_TCHW = self._decode(state, clean, plan)
            if state.past is not None:
                state.past.keep(whole[0])
        if self.config.cache.rewrites:
            with self.trace("cache"):
                self._rewrite(state, frames_TCHW)
        with self.trace("convert"):
            pixels = frames_TCHW.permute(0, 2, 3, 1).contiguous().cpu().numpy()
            chunk = Chunk(state.index, controls.epoch, pixels, whole[0].cpu().numpy(), prompt=state.prompt or "")
            if plan is not None:
                chunk = replace(chunk, active_HW=plan.mask_HW, refreshed_HW=plan.refreshed_HW)
        state.index += 1
        return chunk

    def _pictures(self, source_THWC: np.ndarray, index: int) -> Tensor:
        """The newest, as many as the chunk takes: a shorter source begins with its first picture, standing."""
        count = self.config.latent_frames(index) * self.config.codec.frames
        frames_TCHW = pixels_to_frames(torch.from_numpy(source_THWC[-count:]).to(self.device))
        missing = count - len(frames_TCHW)
        return torch.cat((frames_TCHW[:1].expand(missing, -1, -1, -1), frames_TCHW)) if missing else frames_TCHW

    def _read_prompt(self, state: StreamState, controls: Controls) -> None:
        """What the chunk is drawn from. A new prompt that is not read yet lets the stream go on under the one
        before."""
        words, rewrite = state.wording, False
        if controls.prompt != state.prompt:
            embedding = self.text.embed(controls.prompt) if state.text is None else self.text.ask(controls.prompt)
            if embedding is not None:
                rewrite = words.take(embedding.to(self.device, self.student.dtype), controls)
                state.prompt = controls.prompt
        worn = self.wardrobe.wear(controls.lora, controls.lora_strength)
        if words.advance() or worn != state.worn:
            assert words.now_BLD is not None, "words are taken before they are drawn"
            state.text, state.worn = self.student.text_kv(words.now_BLD), worn
            words.version += 1
        if rewrite and state.past is not None and state.text is not None:
            recache(state.past, self.student, state.text, self.config)

    def _schedule(self, state: StreamState, controls: Controls, frames_TCHW: Tensor | None) -> list[float]:
        """The levels that are asked for."""
        sampler, first = self.config.sampler, state.index == 0
        if frames_TCHW is None:
            return from_noise(levels(sampler, first=first, count=controls.steps))
        return levels_from(sampler, controls.strength, first=first, count=controls.steps)

    def _less(self, state: StreamState, controls: Controls, frames_TCHW: Tensor | None) -> float:
        """How much lower the passes begin than is asked for."""
        aware = self.config.motion_aware if controls.motion_aware is None else controls.motion_aware
        if frames_TCHW is None or not aware:
            state.noise.reset()
            return 0.0
        return state.noise.see(frames_TCHW)

    def _plan(
        self, state: StreamState, controls: Controls, asked: list[float], frames_TCHW: Tensor | None
    ) -> Plan | None:
        """Which tiles to compute; None: no regions are asked for, or this model cannot hold any.

        Held tiles stand on the schedule that is asked for: that something moves fast is no reason to draw them anew.
        """
        if state.regions is None or not (controls.regions or controls.paint):
            if state.regions is not None and state.regions.ready:
                state.regions.reset()
                state.encoder.forget_tiles()
                state.decoder.forget_tiles()
            return None
        key = (state.wording.version, tuple(asked), controls.structure, frames_TCHW is None, controls.source)
        plan = Plan.begin(state.regions, controls.regions, controls.paint, key, frames_TCHW)
        plan.asked = tuple(asked)
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
        """Denoise passes, then the cache pass, unless the last of them is both.

        Returns clean latents (1, T, C, h, w), a column of the planned tiles.
        """
        config, text, count = self.config, state.text, self.config.latent_frames(state.index)
        assert text is not None, "the prompt is read before the first pass"
        shape = (1, count, config.codec.latent_channels, *config.latent_size)
        attend = CachedAttention(state.cache, self.student, config.grid, count)
        if plan is not None:
            attend = RegionAttention(state.cache, self.student, config.grid, count, plan.regions, plan.asked)
        cache_only = config.cache.clean_pass or config.cache.rewrites or not sigmas
        writer = None if cache_only else len(sigmas) - 1
        # Regions keep the keys of every pass, so none is left out with them.
        cached = StepCache(self.student, self.step_cache, len(sigmas)) if self.step_cache and plan is None else None
        gated = config.sampler.prediction == "gated"
        last_BTCHW, same_HW = last_before(state) if gated else (None, None)
        ways, anchor = ends(sigmas), Anchor(config.sampler, on=sigmas[:1] == [1.0] and attend.frames > 0)

        def passes(first: int, last: int | None, start: Tensor | None, tiles: Tiles | None) -> Tensor:
            def noise(step: int) -> Tensor:
                drawn = draw_noise(shape, state.seed, state.index, first + step).to(self.device)
                return drawn if tiles is None else tiles.gather(drawn)

            def student(noisy: Tensor, sigma: float, step: int) -> Tensor:
                with self.trace(f"denoise_{first + step}"):
                    attend.writing = first + step == writer
                    attend.anchored = anchor.holds(sigma)
                    if isinstance(attend, RegionAttention):
                        attend.step = first + step
                        attend.choose(tiles)
                    end = ways[first + step]
                    if cached is not None:
                        times, goals = (torch.full((1, 1), 1000 * level, device=self.device) for level in (sigma, end))
                        out = cached(noisy.to(self.student.dtype), times, text, attend, control, goals).float()
                    else:
                        level = self._level(sigma, end, state.worn)
                        out = self.student.predict(noisy, sigma, text, attend, control, tiles, level)
                    if same_HW is not None:
                        out = shut(out, (same_HW if tiles is None else tiles.gather(same_HW))[None])
                    return anchor.keep(out, sigma)

            before = last_BTCHW if last_BTCHW is None or tiles is None else tiles.gather(last_BTCHW)
            return denoise(student, noise, sigmas[first:last], start, config.sampler.prediction, before)

        if plan is None or not plan.probing:
            clean = passes(0, None, source, plan.tiles if plan else None)
        else:
            probe, gate = passes(0, 1, None, None), anchor.gate
            plan.see(probe[0])

            def rest() -> Tensor:
                anchor.gate = gate if gate is None or plan.tiles is None else plan.tiles.gather(gate)
                return passes(1, None, probe if plan.tiles is None else plan.tiles.gather(probe), plan.tiles)

            clean = rest()
            while plan.spreads(clean):
                clean = rest()
        if writer is None and not config.cache.rewrites:
            with self.trace("cache"):
                tiles = plan.tiles if plan else None
                if isinstance(attend, RegionAttention):
                    attend.choose(tiles)
                attend.writing, attend.anchored = True, False
                self.student.predict(clean, 0.0, text, attend, control, tiles, self._level(0.0, 0.0, state.worn))
        state.cache.commit(count)
        return clean

    def _level_of(self, sigma: float, end: float, worn: tuple[str, float]) -> Modulations:
        """What the student is told of a pass from one level to another while it wears these low-rank weights."""
        return self.student.at(sigma, end)

    def _rewrite(self, state: StreamState, frames_TCHW: Tensor) -> None:
        """Write what is remembered by itself. Nothing is before its oldest frame then, so that is encoded anew, from
        its last picture alone, as a stream's first is; unless a coarse past is. frames_TCHW: the chunk's, uint8.

        Source: the cache recomputation of Krea Realtime (2025).
        """
        assert state.past is not None and state.text is not None, "a stream that is written again keeps its latents"
        codec, after = self.config.codec, state.cache.frames - 1  # frames that are remembered after the oldest
        if state.cache.coarse is not None:
            coarsen(state.past, self.student, state.text, self.config)
        elif state.index:
            count = 1 if codec.first_alone else codec.frames
            picture = from_bytes(frames_TCHW[-1 - after * codec.frames]).expand(count, -1, -1, -1)
            latents = self.codec.encode_push(self.codec.remember(), picture)
            assert latents is not None, "one latent frame is whole"
            state.past.replace_oldest(latents[0])
        recache(state.past, self.student, state.text, self.config, window_only=True)

    def _decode(self, state: StreamState, clean: Tensor, plan: Plan | None) -> tuple[Tensor, Tensor]:
        """Whole clean latents and their pictures (T, 3, H, W), uint8."""
        if plan is None:
            return clean, to_bytes(self.codec.decode_push(state.decoder, clean[0]))
        whole, drawn = plan.keep(clean)
        pictures = to_bytes(self.codec.decode_tiles(state.decoder, whole[0], drawn))
        faded = None if plan.refreshed_HW is None else Tiles.of(plan.refreshed_HW, self.device)
        moved_HW = plan.regions.source.moved_HW if plan.sourced else None
        return whole, plan.regions.show(pictures, drawn, faded, moved_HW)
