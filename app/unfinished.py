"""Files of the hub that were not fetched to their end: what is there is kept, and the next pull goes on behind it.

The hub's own library begins such a file anew. Here it lies beside the whole ones, named by the hash of the whole, so
that one which has changed on the hub is another file, and by whose it is. Fetches over plain HTTP; knows no licence.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from app.errors import AppError
from pipeline.errors import ran_full

ENDING = ".incomplete"
"""The hub's own ending for such files, which its tools know."""


@dataclass(frozen=True)
class Unfinished:
    """repo: its folder in the hub's cache. owner: a name of the table."""

    repo: Path
    owner: str

    @property
    def files(self) -> list[Path]:
        return sorted(self.repo.glob(f"blobs/*.{self.owner}{ENDING}"))

    def file(self, digest: str) -> Path:
        return self.repo / "blobs" / f"{digest}.{self.owner}{ENDING}"

    @property
    def size(self) -> int:
        """In bytes, of all."""
        return sum(path.stat().st_size for path in self.files)

    def drop(self, keep: frozenset[str] = frozenset()) -> int:
        """Take away those of other hashes than these; returns how many bytes are free again."""
        gone = [path for path in self.files if path.name.split(".")[0] not in keep]
        freed = sum(path.stat().st_size for path in gone)
        for path in gone:
            path.unlink(missing_ok=True)
        return freed


def has_hash(path: Path, digest: str) -> bool:
    """Whether a file is the one that the hub names so: by SHA-256 if it is large, by git's hash if it is small."""
    if len(digest) == 64:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == digest
    content = path.read_bytes() if len(digest) == 40 else b""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest() == digest


class Told(Protocol):
    """What the hub's library tells of a file."""

    @property
    def etag(self) -> str | None: ...
    @property
    def size(self) -> int | None: ...


def go_on(unfinished: Unfinished, url: str, told: Told) -> None:
    """Fetch what is missing of a file, and put it among the whole ones, where the hub's library finds it.

    Does nothing for what the hub gives only by its own transfer. Raises AppError (`download_damaged`), and what the
    hub's library raises; where a disk ran full, nothing of the file is left.
    """
    from huggingface_hub import constants
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import WeakFileLock, build_hf_headers  # type: ignore[attr-defined]  # named as it runs

    if told.etag is None or told.size is None or told.size > constants.MAX_HTTP_DOWNLOAD_SIZE:
        return
    whole, part = unfinished.repo / "blobs" / told.etag, unfinished.file(told.etag)
    lock = unfinished.repo.parent / ".locks" / unfinished.repo.name / f"{told.etag}.lock"  # the hub's own
    for folder in (whole.parent, lock.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if whole.exists():
            return
        begun = part.stat().st_size if part.exists() else 0
        if begun > told.size:
            part.unlink()
            begun = 0
        name = url.rsplit("/", 1)[-1]
        headers = build_hf_headers() | {"Accept-Encoding": "identity"}  # a range of compressed bytes is none of ours
        try:
            with part.open("ab") as file:
                http_get(
                    url, file, resume_size=begun, headers=headers, expected_size=told.size, displayed_filename=name
                )
        except OSError as error:
            if ran_full(error):
                part.unlink()
            raise
        if begun and not has_hash(part, told.etag):
            part.unlink()
            raise AppError(
                "download_damaged",
                f"What was kept of {name} and what came now do not have the hash that the hub names.",
                "Pull again: it begins anew.",
            )
        part.replace(whole)
