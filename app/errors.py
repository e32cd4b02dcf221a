"""Errors that a person can act on, and what all three rooms' errors have in common."""

import re
from typing import Any

from pipeline.errors import PipelineError
from streaming.errors import WireError


class AppError(Exception):
    """Raised where the halves meet. code: stable snake_case name. message: one sentence. remedy: what to do next."""

    def __init__(self, code: str, message: str, remedy: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.remedy = remedy

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        return type(self), (self.code, self.message, self.remedy)


class WorkerLostError(Exception):
    """The worker process ended, or stopped answering, before it replied. told: why, if a person can act on it."""

    def __init__(self, reason: str, told: AppError | None = None) -> None:
        super().__init__(reason)
        self.told = told


SPOKEN = (AppError, PipelineError, WireError)
"""Errors whose code, message and remedy are meant for the person in front of the screen."""

INTERNAL = AppError(
    "internal_error", "Something went wrong inside the server.", "Start again; the server's log says more."
)

DENSE_ONLY = AppError(
    "regions_unsupported",
    "This model cannot hold tiles of its picture: all of each chunk is computed.",
    "Choose a width and height that are multiples of 32, or another model.",
)


_ASKED = re.compile(r"[Tt]ried to allocate ([\d.]+ \w+)")
_FREE = re.compile(r"capacity of ([\d.]+ \w+) of which ([\d.]+ \w+) is free")
_USED = re.compile(r"this process has ([\d.]+ \w+) memory in use")


def memory_short(error: BaseException) -> AppError | None:
    """What torch or Python say when memory runs out, for a person; None: the error is another one."""
    text = str(error)
    # By its name, since torch is not imported everywhere; for a CPU, or a driver that does not start, it has no class.
    known = type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError)
    if not known and not any(sign in text for sign in ("DefaultCPUAllocator", "CUDA error: out of memory")):
        return None
    facts = []
    if asked := _ASKED.search(text):
        facts.append(f"{asked[1]} more were asked for")
    if free := _FREE.search(text):
        facts.append(f"{free[2]} of {free[1]} are free")
    if used := _USED.search(text):
        facts.append(f"this process uses {used[1]}")
    return AppError(
        "memory_short",
        "Memory ran out" + (f": {', '.join(facts)}." if facts else "."),
        "Choose a smaller model or picture, fewer workers, or 8 bits for a model on Wan; or end what else is running.",
    )


def error_message(error: AppError | PipelineError | WireError, *, fatal: bool = False) -> dict[str, Any]:
    """The error as the wire says it."""
    return {"kind": "error", "code": error.code, "message": error.message, "next": error.remedy, "fatal": fatal}
