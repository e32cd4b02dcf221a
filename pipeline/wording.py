"""The words that one stream is drawn from, and how new ones come in: at once, over chunks, or with the past rewritten.

`Wording` knows embeddings only; what keys and values are made of them is the engine's affair. `recache` writes the
remembered past again. Knows no schedule and no pictures.
"""

from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from pipeline.chunk import Controls
from pipeline.kv_cache import KVCache
from pipeline.student import CachedAttention, Student, TextKV


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
    """The clean latents of the frames that a cache remembers, in the cache's own slots: (slots, C, h, w)."""

    def __init__(self, cache: KVCache, size_CHW: tuple[int, int, int], device: torch.device | str) -> None:
        self.cache = cache
        self.latents_NCHW = torch.zeros(cache.config.sink + cache.config.window, *size_CHW, device=device)

    def keep(self, clean_TCHW: Tensor) -> None:
        """Those of the frames that the cache committed last."""
        for number, latent_CHW in enumerate(clean_TCHW, self.cache.written - len(clean_TCHW)):
            self.latents_NCHW[self.cache.slot(number)] = latent_CHW

    def newest(self) -> Tensor | None:
        """The latest of them, (C, h, w); None at a stream's beginning."""
        return self.latents_NCHW[self.cache.slot(self.cache.written - 1)] if self.cache.written else None

    def replace_oldest(self, latent_CHW: Tensor) -> None:
        self.latents_NCHW[self.cache.slots()[0]] = latent_CHW

    def read(self) -> Tensor:
        """In the order of their positions, (T, C, h, w)."""
        return self.latents_NCHW[self.cache.slots()]


def recache(past: PastLatents, student: Student, text: TextKV, grid: tuple[int, int], chunk: int) -> None:
    """Write the remembered past again under other words, as a stream would that began with it.

    Frames of one chunk go together, as when they were drawn. Source: LongLive (2025).
    """
    cache, latents_TCHW, place = past.cache, past.read(), 0
    for _, group in groupby(cache.numbers(), key=lambda number: number // chunk):
        count = len(list(group))
        attend = CachedAttention(cache, student, grid, count, place)
        attend.writing = True
        student.predict(latents_TCHW[None, place : place + count], 0.0, text, attend)
        place += count
