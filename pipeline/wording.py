"""The words that one stream is drawn from, and how new ones come in: at once, over chunks, or with the past rewritten.

`Wording` knows embeddings only; what keys and values are made of them is the engine's affair. `recache` writes the
remembered past again, `coarsen` what has left the window. Knows no schedule and no pictures.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from pipeline.attention import CachedAttention
from pipeline.chunk import Controls
from pipeline.config import ModelConfig
from pipeline.kv_cache import KVCache, ring_slot
from pipeline.student import Student, TextKV


@dataclass
class Wording:
    """now_BLD: the embedding that is drawn. target_BLD: the newest prompt's.

    start_BLD, done, span: of a glide, where it began and how many of its chunks are behind. version: raised by whoever
    makes keys and values anew.
    """

    now_BLD: Tensor | None = None
    target_BLD: Tensor | None = None
    start_BLD: Tensor | None = None
    done: int = 0
    span: int = 0
    version: int = 0

    def reset(self) -> None:
        self.now_BLD = self.target_BLD = self.start_BLD = None
        self.done = self.span = 0

    def take(self, embedding_BLD: Tensor, controls: Controls) -> bool:
        """A new prompt, from the coming chunk on; returns whether the past has to be rewritten.

        A stream's first prompt simply is there. One that reads the same as the prompt before changes nothing.
        """
        first = self.now_BLD is None
        if self.target_BLD is not None and torch.equal(embedding_BLD, self.target_BLD):
            return False
        self.target_BLD = embedding_BLD
        self.start_BLD = self.now_BLD if controls.transition == "glide" else None
        self.done, self.span = 0, controls.glide_chunks
        return not first and controls.transition == "recache"

    def advance(self) -> bool:
        """Go on to the coming chunk; returns whether it is drawn from another embedding than the one before."""
        assert self.target_BLD is not None, "words are taken before they are drawn"
        then, self.now_BLD = self.now_BLD, self.target_BLD
        if self.start_BLD is not None:
            self.done += 1
            if self.done < self.span:
                self.now_BLD = torch.lerp(self.start_BLD, self.target_BLD, self.done / self.span)
            else:
                self.start_BLD = None
        return self.now_BLD is not then


class PastLatents:
    """The clean latents of the frames that a cache remembers, the coarse ones too: (slots, C, h, w)."""

    def __init__(self, cache: KVCache, size_CHW: tuple[int, int, int], device: torch.device | str) -> None:
        self.cache, self.ring = cache, cache.config.coarse + cache.config.window
        self.latents_NCHW = torch.zeros(cache.config.sink + self.ring, *size_CHW, device=device)

    def slot(self, number: int) -> int:
        return ring_slot(number, self.cache.config.sink, self.ring)

    def keep(self, clean_TCHW: Tensor) -> None:
        """Those of the frames that the cache committed last."""
        for number, latent_CHW in enumerate(clean_TCHW, self.cache.written - len(clean_TCHW)):
            self.latents_NCHW[self.slot(number)] = latent_CHW

    def newest(self) -> Tensor | None:
        """The latest of them, (C, h, w); None at a stream's beginning."""
        return self.latents_NCHW[self.slot(self.cache.written - 1)] if self.cache.written else None

    def replace_oldest(self, latent_CHW: Tensor) -> None:
        self.latents_NCHW[self.slot(self.cache.numbers()[0])] = latent_CHW

    def read(self, numbers: Sequence[int] | None = None) -> Tensor:
        """Those of these frames, or of all that are not coarse, in the order of their positions, (T, C, h, w)."""
        wanted = self.cache.numbers() if numbers is None else numbers
        return self.latents_NCHW[[self.slot(number) for number in wanted]]


def by_chunk(numbers: Iterable[int], config: ModelConfig) -> list[list[int]]:
    """Frames of one chunk go together, as when they were drawn."""
    return [list(group) for _, group in groupby(numbers, key=config.chunk_of)]


def recache(
    past: PastLatents, student: Student, text: TextKV, config: ModelConfig, *, window_only: bool = False
) -> None:
    """Write the remembered past again under other words, as a stream would that began with it.

    window_only: but for the coarse past. Source: LongLive (2025).
    """
    far = None if window_only else past.cache.coarse
    for coarse, cache in ((True, far), (False, past.cache)):
        place = 0
        for numbers in by_chunk(cache.numbers() if cache is not None else (), config):
            attend = CachedAttention(past.cache, student, config.grid, len(numbers), place, coarse=coarse)
            student.write(past.read(numbers)[None], text, attend, coarse=coarse)
            place += len(numbers)


def coarsen(past: PastLatents, student: Student, text: TextKV, config: ModelConfig) -> None:
    """Write into the coarse past what has left the window; for good, since nothing that it sees will change.

    Source: the compressed context of FAR (2025).
    """
    far = past.cache.coarse
    assert far is not None, "there is a coarse past to write into"
    for numbers in by_chunk(range(far.written, past.cache.numbers()[0]), config):
        attend = CachedAttention(past.cache, student, config.grid, len(numbers), coarse=True)
        student.write(past.read(numbers)[None], text, attend, coarse=True)
        far.commit(len(numbers))
