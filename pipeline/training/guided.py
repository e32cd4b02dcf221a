"""The teacher as an engine: many guided Euler steps a chunk, through the same cache as a live stream.

Two rows go in step, one under the prompt and one under no words; what lies between them is followed beyond the first.
Each row has its own past, as in training, where a clip without a caption has none in its past either.
It shows how good a few steps could be. It is far too slow for a live stream, and follows no camera.
"""

from itertools import pairwise
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

from pipeline.attention import CachedAttention
from pipeline.chunk import Controls
from pipeline.codec import CodecMemory, PocketCodec
from pipeline.config import ModelConfig
from pipeline.engine import Engine
from pipeline.errors import PipelineError
from pipeline.kv_cache import KVCache
from pipeline.plan import Plan
from pipeline.sampler import clean_from, draw_noise, guide, with_steps
from pipeline.state import StreamState, last_before
from pipeline.step_cache import StepCache
from pipeline.student import Student
from pipeline.text import TextEncoder
from pipeline.training.settings import StudentSettings
from pipeline.training.teacher import Denoiser
from pipeline.wording import PastLatents

STEPS = 50


class GuidedTeacher(Engine):
    """guidance: 1 follows the prompt alone, more goes beyond it; the default is what the student is taught with."""

    def __init__(
        self,
        config: ModelConfig,
        codec: PocketCodec,
        text: TextEncoder,
        student: Student,
        *,
        steps: int = STEPS,
        guidance: float = StudentSettings().guidance,
        step_cache: float = 0.0,
    ) -> None:
        super().__init__(with_steps(config, steps), codec, text, student, step_cache=step_cache)
        self.guidance, self.words = guidance, text

    def open(self, seed: int) -> StreamState:
        cache = KVCache.of(self.config, batch=2, device=self.device)
        past = PastLatents(cache, (self.config.codec.latent_channels, *self.config.latent_size), self.device)
        return StreamState(cache, CodecMemory(), CodecMemory(), seed, past=past)

    def _read_prompt(self, state: StreamState, controls: Controls) -> None:
        prompt = controls.prompt
        if prompt != state.prompt:
            tokens = self.words.tokenize([prompt, ""]).to(self.device)
            state.text = self.student.text_kv(self.words(tokens))
            state.prompt = prompt
            state.wording.version += 1

    def _denoise(
        self, state: StreamState, sigmas: list[float], source: Tensor | None, control: Tensor | None, plan: Plan | None
    ) -> Tensor:
        assert source is None and plan is None, "the teacher follows no camera and holds nothing"
        config, text = self.config, state.text
        assert text is not None, "the prompt is read before the first pass"
        shape = (1, config.chunk, config.codec.latent_channels, *config.latent_size)
        attend = CachedAttention(state.cache, self.student, config.grid, config.chunk)
        noisy = draw_noise(shape, state.seed, state.index, 0).to(self.device)
        cached = StepCache(self.student, self.step_cache, len(sigmas))
        last, _ = last_before(state)
        for high, low in pairwise([*sigmas, 0.0]):
            both = noisy.expand(2, -1, -1, -1, -1)
            out = cached(both, torch.full((1, 1), 1000 * high, device=self.device), text, attend)
            told, free = out.split(1)
            out = guide(config.sampler.prediction, told, free, self.guidance)
            guided = clean_from(config.sampler.prediction, out, noisy, high, last)
            noisy = guided + low / high * (noisy - guided)
        with self.trace("cache"):
            attend.writing = True
            self.student(noisy.expand(2, -1, -1, -1, -1), torch.zeros(1, 1, device=self.device), text, attend)
            state.cache.commit(config.chunk)
        return noisy


def load_teacher(path: Path, engine: Engine) -> GuidedTeacher:
    """The average in a teacher's checkpoint, over the engine's codec: both must come from one training run.

    path: the checkpoint or its folder. Raises PipelineError: `teacher_unreadable`, `checkpoint_of_another_stage`,
    `checkpoint_of_another_model`.
    """
    file = path / "checkpoint.pt" if path.is_dir() else path
    try:
        saved = torch.load(file, weights_only=True, map_location="cpu")
        name, values = saved["name"], saved["ema"]
    except (OSError, RuntimeError, UnpicklingError, EOFError, KeyError, TypeError) as error:
        what = "is not there" if isinstance(error, FileNotFoundError) else "is not a checkpoint of the training"
        raise PipelineError(
            "teacher_unreadable", f"{file} {what}.", "Name the teacher's folder, as runs/pocket/teacher."
        ) from error
    if name != "teacher":
        raise PipelineError(
            "checkpoint_of_another_stage",
            f"{file} belongs to stage {name!r}, not 'teacher'.",
            "Name the teacher's folder, as runs/pocket/teacher.",
        )
    denoiser = Denoiser(engine.config)
    try:
        denoiser.load_state_dict(values)
    except RuntimeError as error:
        raise PipelineError(
            "checkpoint_of_another_model",
            f"{file} does not fit this model: {str(error).splitlines()[-1].strip().rstrip('.')}.",
            "Name the model and the teacher of one training run.",
        ) from error
    denoiser.eval().requires_grad_(False)
    assert isinstance(engine.codec, PocketCodec), "teachers are of pocket students"
    return GuidedTeacher(engine.config, engine.codec, denoiser.text, denoiser.student)
