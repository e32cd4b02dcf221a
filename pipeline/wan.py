"""A Wan model put together from its parts: student, text encoder, and the two codecs as the engine's one.

The tiny decoder is for watching live, Wan's autoencoder for recording; encoding is the autoencoder's. Which tiles are
computed concerns the student alone: these codecs always take a whole picture, and cut tiles out of the result.
Knows the layout of no repo: where the parts lie is told.
"""

from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor, nn

from pipeline.config import ModelConfig, WanModel
from pipeline.prompts import Prompts
from pipeline.student import Student
from pipeline.tiles import Tiles
from pipeline.tiny_codec import TinyDecoder, TinyMemory, load_tiny_decoder
from pipeline.umt5 import PLACES, fingerprint, load_umt5
from pipeline.wan_codec import WanCodec, WanMemory, load_wan_codec
from pipeline.weights import load_transformer


@dataclass
class PairMemory:
    """What one direction of a stream remembers; the other's is never filled."""

    vae: WanMemory = field(default_factory=WanMemory)
    tiny: TinyMemory = field(default_factory=TinyMemory)

    def reset(self) -> None:
        self.vae.reset()
        self.tiny.reset()

    def forget_tiles(self) -> None:
        """All is whole anyway."""


class WanPair(nn.Module):
    """Wan's autoencoder, and the tiny decoder in its stead where there is one; a `codec.Codec`."""

    def __init__(self, vae: WanCodec, tiny: TinyDecoder | None = None) -> None:
        super().__init__()
        self.vae, self.tiny = vae, tiny

    def place(self, device: torch.device) -> Self:
        return self.to(device)

    def remember(self) -> PairMemory:
        return PairMemory()

    def encode_push(self, memory: PairMemory, frames_TCHW: Tensor) -> Tensor | None:
        """Of a stream's first chunk the oldest pictures are left out: its first latent frame is one picture."""
        surplus = 0 if memory.vae.seen else (len(frames_TCHW) - 1) % self.vae.frames
        latents = self.vae.encode_push(memory.vae, frames_TCHW[surplus:].to(self._dtype))
        return None if latents is None else latents.float()

    def encode_tiles(self, memory: PairMemory, frames_TCHW: Tensor, tiles: Tiles | None) -> Tensor:
        latents = self.encode_push(memory, frames_TCHW)
        assert latents is not None, "a chunk of pictures fills its latent frames"
        return latents if tiles is None else tiles.gather(latents)

    def decode_push(self, memory: PairMemory, latents_TCHW: Tensor) -> Tensor:
        latents_TCHW = latents_TCHW.to(self._dtype)
        if self.tiny is not None:
            return self.tiny.decode_push(memory.tiny, latents_TCHW).float()
        return self.vae.decode_push(memory.vae, latents_TCHW).float()

    def decode_tiles(self, memory: PairMemory, latents_TCHW: Tensor, tiles: Tiles | None) -> Tensor:
        pictures = self.decode_push(memory, latents_TCHW)
        return pictures if tiles is None else tiles.gather(pictures)

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


def load_wan(model: WanModel, device: str) -> tuple[ModelConfig, WanPair, Prompts, Student]:
    """All parts, frozen; on a GPU in bfloat16, on a CPU in single precision.

    Raises PipelineError: those of `load_transformer`, `load_wan_codec`, `load_tiny_decoder` and `load_umt5`.
    """
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    tiny = None if model.tiny is None else load_tiny_decoder(model.tiny)
    pair = WanPair(load_wan_codec(model.vae), tiny).to(dtype)
    reader = load_umt5(model.text_encoder, model.tokenizer, device=model.text_device, bits=model.text_bits)
    key = fingerprint(model.text_encoder, model.tokenizer, model.text_bits)
    text = Prompts(reader.read, PLACES, key=key, folder=model.prompts)
    student = load_transformer(model.transformer, model.config.student, dtype)
    return model.config, pair, text, student.eval().requires_grad_(False)
