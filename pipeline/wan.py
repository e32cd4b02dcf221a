"""A Wan model put together from its parts: student, text encoder, and an encoder and a decoder as the engine's codec.

TAEHV's tiny ones are for watching live, Wan's autoencoder for recording. Whether chosen tiles cost less than all is
their own affair.
Knows the layout of no repo: where the parts lie is told.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from pipeline.config import SWAP, ModelConfig, WanModel
from pipeline.prompts import Prompts
from pipeline.student import Student
from pipeline.tiles import Tiles
from pipeline.tiny_codec import TinyDecoder, TinyEncoder, load_tiny_decoder, load_tiny_encoder
from pipeline.umt5 import PLACES, fingerprint, load_umt5
from pipeline.wan_codec import WanCodec, load_wan_codec
from pipeline.weights import load_transformer


@dataclass
class PairMemory:
    """What one direction of a stream remembers; the other's is never filled. begun: there were pictures to encode."""

    encoder: Any
    decoder: Any
    begun: bool = False

    def reset(self) -> None:
        self.encoder.reset()
        self.decoder.reset()
        self.begun = False

    def forget_tiles(self) -> None:
        self.encoder.forget_tiles()
        self.decoder.forget_tiles()


class WanPair(nn.Module):
    """One that encodes and one that decodes, perhaps the same; a `codec.Codec`."""

    def __init__(self, encoder: WanCodec | TinyEncoder, decoder: WanCodec | TinyDecoder) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def place(self, device: torch.device) -> Self:
        return self.to(device)

    def remember(self) -> PairMemory:
        return PairMemory(self.encoder.remember(), self.decoder.remember())

    def encode_push(self, memory: PairMemory, frames_TCHW: Tensor) -> Tensor | None:
        latents = self.encoder.encode_push(memory.encoder, self._begin(memory, frames_TCHW))
        return None if latents is None else latents.float()

    def encode_tiles(self, memory: PairMemory, frames_TCHW: Tensor, tiles: Tiles | None) -> Tensor:
        return self.encoder.encode_tiles(memory.encoder, self._begin(memory, frames_TCHW), tiles).float()

    def decode_push(self, memory: PairMemory, latents_TCHW: Tensor) -> Tensor:
        return self.decoder.decode_push(memory.decoder, latents_TCHW.to(self._dtype)).float()

    def decode_tiles(self, memory: PairMemory, latents_TCHW: Tensor, tiles: Tiles | None) -> Tensor:
        return self.decoder.decode_tiles(memory.decoder, latents_TCHW.to(self._dtype), tiles).float()

    def _begin(self, memory: PairMemory, frames_TCHW: Tensor) -> Tensor:
        """Of a stream's first chunk the oldest pictures are left out: its first latent frame is one picture."""
        surplus = 0 if memory.begun else (len(frames_TCHW) - 1) % self.encoder.frames
        memory.begun = True
        return frames_TCHW[surplus:].to(self._dtype)

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


def load_pair(vae: Path, tiny: Path | None) -> WanPair:
    """vae: a folder, read where it is needed. tiny: a file of TAEHV's, which may be without an encoder, or None.

    Raises PipelineError: those of `load_wan_codec`, `load_tiny_decoder` and `load_tiny_encoder`.
    """
    if tiny is None:
        whole = load_wan_codec(vae)
        return WanPair(whole, whole)
    decoder, encoder = load_tiny_decoder(tiny), load_tiny_encoder(tiny)
    return WanPair(load_wan_codec(vae) if encoder is None else encoder, decoder)


def load_wan(model: WanModel, device: str) -> tuple[ModelConfig, WanPair, Prompts, Student]:
    """All parts, frozen; on a GPU in bfloat16, on a CPU in single precision.

    Raises PipelineError: those of `load_transformer`, `load_pair` and `load_umt5`.
    """
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    pair = load_pair(model.vae, model.tiny).to(dtype)
    swapped = model.text_device == SWAP
    reader = load_umt5(
        model.text_encoder,
        model.tokenizer,
        device=device if swapped else model.text_device,
        swapped=swapped,
        bits=model.text_bits,
    )
    key = fingerprint(model.text_encoder, model.tokenizer, model.text_bits)
    text = Prompts(reader.read, PLACES, key=key, folder=model.prompts)
    student = load_transformer(model.transformer, model.config.student, dtype, bits=model.bits, device=device)
    return model.config, pair, text, student.eval().requires_grad_(False)
