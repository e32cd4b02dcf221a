"""Clips that were encoded beforehand, by whatever autoencoder and text encoder: latents and prompt embeddings on disk.

One safetensors file a clip: `latents` (T, C, h, w) and `text` (K, L, D), one prompt for the whole clip (K = 1) or one
for each chunk. `unprompted.safetensors` holds `text` (1, L, D), the embedding of no prompt. Half precision or single.
Batches are counter-based, and each clip of a batch draws its noise from a generator of its own: n processes that share
a batch see what one alone would see. Knows nothing of how the clips were made, nor of models.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from pipeline.config import ModelConfig
from pipeline.errors import PipelineError

UNPROMPTED = "unprompted.safetensors"
FLOATS = ("F16", "BF16", "F32")


@dataclass(frozen=True)
class Batch:
    """Some clips in float32, a prompt's embedding for each of their chunks, and a generator for each clip."""

    latents_BTCHW: Tensor
    text_BKLD: Tensor
    generators: list[torch.Generator]

    def drawn(self, draw: Callable[[Tensor, torch.Generator], Tensor]) -> Tensor:
        """What each clip (1, T, C, H, W) draws from its generator, side by side."""
        return torch.cat([draw(clip[None], of) for clip, of in zip(self.latents_BTCHW, self.generators, strict=True)])


class Precomputed:
    """A folder of encoded clips. Reads all headers at once, and tensors when a batch asks for them.

    Raises PipelineError: `data_empty`, `data_invalid`.
    """

    def __init__(self, folder: Path, config: ModelConfig, seed: int) -> None:
        self.seed = seed
        self.length = config.text.length
        self.paths = sorted(path for path in folder.glob("*.safetensors") if path.name != UNPROMPTED)
        if not self.paths:
            raise PipelineError(
                "data_empty",
                f"There are no encoded clips in {folder}.",
                "Name a folder of .safetensors files, each with `latents` and `text`.",
            )
        expected = (config.codec.latent_channels, *config.latent_size)
        frames = _shapes(self.paths[0], ("latents", "text"))["latents"][0]
        if not frames or frames % config.chunk:
            raise _invalid(self.paths[0], f"{frames} latent frames do not fill chunks of {config.chunk}")
        self.chunks = frames // config.chunk
        for path in self.paths:
            shapes = _shapes(path, ("latents", "text"))
            if shapes["latents"] != (frames, *expected):
                raise _invalid(path, f"its latents are {shapes['latents']}, not {(frames, *expected)}")
            self._check_text(path, shapes["text"], config, (1, self.chunks))
        self._check_text(folder / UNPROMPTED, _shapes(folder / UNPROMPTED, ("text",))["text"], config, (1,))
        self.unprompted_LD = self._text(folder / UNPROMPTED)[0]

    def _check_text(self, path: Path, shape: tuple[int, ...], config: ModelConfig, prompts: tuple[int, ...]) -> None:
        fits = len(shape) == 3 and shape[0] in prompts and 0 < shape[1] <= self.length
        if not fits or shape[2] != config.student.text_dim:
            counts = " or ".join(str(count) for count in dict.fromkeys(prompts))
            wanted = f"({counts}, up to {self.length}, {config.student.text_dim})"
            raise _invalid(path, f"its text is {shape}, not {wanted}")

    def _text(self, path: Path) -> Tensor:
        """(K, length, D); places after the last word are zero, as Wan pads its prompts."""
        text = _read(path, "text")
        return F.pad(text, (0, 0, 0, self.length - text.shape[1]))

    def batch(self, step: int, size: int, *, rank: int = 0, ranks: int = 1) -> Batch:
        """The rank's share of batch `step`, a pure function of (seed, step); the shares in order are the batch."""
        assert size % ranks == 0, f"a batch of {size} has no equal shares for {ranks} processes"
        picked = _rng(self.seed, step).integers(0, len(self.paths), size)
        share = range(rank * size // ranks, (rank + 1) * size // ranks)
        paths = [self.paths[picked[row]] for row in share]
        texts = [self._text(path).expand(self.chunks, -1, -1) for path in paths]
        seeds = [int(_rng(self.seed, step, row).integers(2**63)) for row in share]
        return Batch(
            torch.stack([_read(path, "latents") for path in paths]),
            torch.stack(texts),
            [torch.Generator().manual_seed(seed) for seed in seeds],
        )


def write_clip(path: Path, latents_TCHW: Tensor, text_KLD: Tensor) -> None:
    """One encoded clip, in the kind of float that it has."""
    save_file({"latents": latents_TCHW.contiguous(), "text": text_KLD.contiguous()}, path)


def write_unprompted(path: Path, text_1LD: Tensor) -> None:
    """The embedding of no prompt; a folder's has the name UNPROMPTED."""
    save_file({"text": text_1LD.contiguous()}, path)


def _rng(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def _shapes(path: Path, names: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """The shapes in a file that has exactly these tensors, all of them floats."""
    if not path.is_file():
        raise PipelineError(
            "data_invalid", f"{path} is not there.", "Encode the empty prompt too: guidance stands on it."
        )
    try:
        with safe_open(path, "pt") as file:
            if set(file.keys()) != set(names):
                raise _invalid(path, f"it holds {', '.join(sorted(file.keys())) or 'nothing'}, not {', '.join(names)}")
            for name in names:
                if file.get_slice(name).get_dtype() not in FLOATS:
                    raise _invalid(path, f"its {name} is {file.get_slice(name).get_dtype()}, not a float")
            return {name: tuple(file.get_slice(name).get_shape()) for name in names}
    except (SafetensorError, OSError) as error:
        raise _invalid(path, f"it cannot be read ({error})") from error


def _read(path: Path, name: str) -> Tensor:
    """Raises PipelineError `data_invalid` for a value that is no number: one would spoil every weight."""
    try:
        with safe_open(path, "pt") as file:
            value: Tensor = file.get_tensor(name).float()
    except (SafetensorError, OSError) as error:
        raise _invalid(path, f"it cannot be read ({error})") from error
    if not value.isfinite().all():
        raise _invalid(path, f"its {name} has a value that is not finite")
    return value


def _invalid(path: Path, what: str) -> PipelineError:
    return PipelineError("data_invalid", f"{path} is no clip for this model: {what}.", "Encode it again, or remove it.")
