"""Wan's autoencoder as a stream: diffusers' `AutoencoderKLWan`, whose memory of the past belongs to the stream here.

One latent frame carries four pictures, a stream's first one alone. Latents are normalised on both sides, as Wan's
transformers know them. Whatever pieces a stream comes in, the result is that of the whole. Knows nothing of time steps,
prompts or the transformer.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers.utils import import_utils
from torch import Tensor, nn

from pipeline.checkpoints import read_checkpoint
from pipeline.codec import PicturesPending
from pipeline.errors import PipelineError
from pipeline.fit import difference
from pipeline.tiles import Tiles

import_utils._xformers_available = False  # `pipeline.student` says why
from diffusers import AutoencoderKLWan  # noqa: E402
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d  # noqa: E402


@dataclass
class WanMemory(PicturesPending):
    """What one direction of one stream remembers: what its convolutions saw last, None before the first frame."""

    seen: list[Tensor | str | None] = field(default_factory=list)

    def reset(self) -> None:
        super().reset()
        self.seen.clear()

    def forget_tiles(self) -> None:
        """All is whole anyway."""


class WanCodec(nn.Module):
    """Pictures: float in [-1, 1], (T, 3, H, W). Latents: about unit normal, (T, C, H / 8, W / 8)."""

    frames = 4

    def __init__(self, vae: AutoencoderKLWan) -> None:
        super().__init__()
        assert vae.config.patch_size is None, "this is the autoencoder of Wan 2.2, which cuts pictures into patches"
        self.vae = vae
        self.register_buffer("mean", torch.tensor(vae.config.latents_mean)[:, None, None], persistent=False)
        self.register_buffer("deviation", torch.tensor(vae.config.latents_std)[:, None, None], persistent=False)
        self.mean: Tensor
        self.deviation: Tensor

    def remember(self) -> WanMemory:
        return WanMemory()

    def encode_push(self, memory: WanMemory, frames_TCHW: Tensor) -> Tensor | None:
        """Take any number of pictures; return the latent frames they complete (T, C, h, w), or None: needs more."""
        frames = memory.take(frames_TCHW)
        latents = []
        while len(frames) >= (wanted := self.frames if memory.seen else 1):
            self._begin(memory, self.vae.encoder)
            piece = frames[:wanted].transpose(0, 1)[None]
            latents.append(self.vae.encoder(piece, feat_cache=memory.seen, feat_idx=[0]))
            frames = frames[wanted:]
        memory.keep(frames)
        if not latents:
            return None
        mean = self.vae.quant_conv(torch.cat(latents, 2)).chunk(2, 1)[0]
        return (mean[0].transpose(0, 1) - self.mean) / self.deviation

    def decode_push(self, memory: WanMemory, latents_TCHW: Tensor) -> Tensor:
        """Decode the next latent frames of a stream; returns pictures, four for each, one for a stream's first."""
        whole = self.vae.post_quant_conv((latents_TCHW * self.deviation + self.mean).transpose(0, 1)[None])
        frames = []
        for piece in whole.split(1, 2):
            first = self._begin(memory, self.vae.decoder)
            frames.append(self.vae.decoder(piece, feat_cache=memory.seen, feat_idx=[0], first_chunk=first))
        return torch.cat(frames, 2)[0].transpose(0, 1).clamp(-1, 1)

    def encode_tiles(self, memory: WanMemory, frames_TCHW: Tensor, tiles: Tiles | None) -> Tensor:
        """The same of a chunk of pictures, a column of tiles cut from the whole."""
        latents = self.encode_push(memory, frames_TCHW)
        assert latents is not None, "a chunk of pictures fills its latent frames"
        return latents if tiles is None else tiles.gather(latents)

    def decode_tiles(self, memory: WanMemory, latents_TCHW: Tensor, tiles: Tiles | None) -> Tensor:
        """The same, a column of tiles cut from the whole."""
        pictures = self.decode_push(memory, latents_TCHW)
        return pictures if tiles is None else tiles.gather(pictures)

    def _begin(self, memory: WanMemory, part: nn.Module) -> bool:
        """Make places for what the convolutions of a part will see; whether it is the stream's first frame."""
        if memory.seen:
            return False
        memory.seen += [None] * sum(isinstance(layer, WanCausalConv3d) for layer in part.modules())
        return True


def load_wan_codec(folder: Path) -> WanCodec:
    """Wan's autoencoder from a folder in diffusers' layout, the one called vae; frozen, in single precision.

    Raises PipelineError: `weights_missing`, `checkpoint_mismatch`, and those of `read_checkpoint`.
    """
    path = folder / "config.json"
    try:
        told = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise PipelineError(
            "weights_missing", f"There is no {path}, or it is not JSON.", "Name a folder that diffusers wrote, its vae."
        ) from error
    if not isinstance(told, dict) or told.get("_class_name") != "AutoencoderKLWan" or told.get("patch_size"):
        raise _not_wans(folder, "it describes another model than Wan 2.1's autoencoder")
    weights = dict(read_checkpoint(folder / "diffusion_pytorch_model.safetensors"))
    with torch.device("meta"):
        vae = AutoencoderKLWan.from_config(told)
    if differs := difference(weights, vae.state_dict()):
        raise _not_wans(folder, differs)
    copies = {name: value.to(torch.float32, copy=True) for name, value in weights.items()}
    vae.load_state_dict(copies, assign=True)
    return WanCodec(vae.eval().requires_grad_(False))


def _not_wans(folder: Path, why: str) -> PipelineError:
    return PipelineError(
        "checkpoint_mismatch",
        f"{folder} does not fit: {why}.",
        "Fetch the vae folder of Wan-AI/Wan2.1-T2V-1.3B-Diffusers.",
    )
