"""Embeddings of prompts, off the stream's path: from memory, from disk, or read on a thread of their own.

A large text encoder takes seconds for a prompt, and a stream does not wait: it goes on under the words before. What was
read once is kept, on disk under what the embedding hangs on. Knows no transformer; who reads is handed in.
"""

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

log = logging.getLogger("stillstream.prompts")

REMEMBERED = 64  # embeddings in memory


class Prompts:
    """read: a prompt's embedding, (tokens, dim). key: what it hangs on besides. folder: None keeps nothing on disk."""

    def __init__(
        self, read: Callable[[str], Tensor], places: int, *, key: str = "", folder: Path | None = None
    ) -> None:
        self._read, self._places, self._key, self._folder = read, places, key, folder
        self._known: OrderedDict[str, Tensor] = OrderedDict()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prompts")
        self._reading: dict[str, Future[Tensor]] = {}

    def place(self, device: torch.device) -> Self:
        """The reader stays where it is: it may be too large for the device of the stream."""
        return self

    def unknown(self, prompt: str) -> list[str]:
        """Tokens are made of any text."""
        return []

    def embed(self, prompt: str) -> Tensor:
        """(1, places, dim), zeros after the last token; waits until it is read."""
        if prompt not in self._known:
            self._begin(prompt)
            self._settle(prompt)
        return self._padded(prompt)

    def ask(self, prompt: str) -> Tensor | None:
        """The same without waiting: None while it is being read. The newest prompt is read next."""
        if prompt not in self._known:
            self._begin(prompt)
            if not self._reading[prompt].done():
                return None
            self._settle(prompt)
        return self._padded(prompt)

    def _begin(self, prompt: str) -> None:
        if prompt in self._reading:
            return
        # What nobody wants any more is not begun; what was begun is read to its end.
        self._reading = {text: future for text, future in self._reading.items() if not future.cancel()}
        self._reading[prompt] = self._thread.submit(self._find, prompt)

    def _settle(self, prompt: str) -> None:
        self._known[prompt] = self._reading.pop(prompt).result()
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)

    def _padded(self, prompt: str) -> Tensor:
        self._known.move_to_end(prompt)
        known = self._known[prompt]
        return F.pad(known, (0, 0, 0, self._places - len(known)))[None]

    def _find(self, prompt: str) -> Tensor:
        path = self._path(prompt)
        if path is not None and path.is_file():
            try:
                return load_file(path)["embedding"]
            except (SafetensorError, OSError, KeyError):
                log.warning("%s cannot be read; the prompt is read again", path)
        made = self._read(prompt)
        if path is not None:
            self._keep(path, made)
        return made

    def _keep(self, path: Path, made: Tensor) -> None:
        part = path.with_suffix(".part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({"embedding": made.contiguous()}, part)
            part.replace(path)
        except (OSError, SafetensorError) as error:  # a full disk is no reason to stop a stream
            log.warning("%s cannot be kept: %s", path, error)
            with suppress(OSError):
                part.unlink()

    def _path(self, prompt: str) -> Path | None:
        if self._folder is None:
            return None
        return self._folder / self._key[:16] / f"{hashlib.sha256(prompt.encode()).hexdigest()[:32]}.safetensors"
