"""Errors that a person can act on, and what all three rooms' errors have in common."""

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
    """The worker process ended, or stopped answering, before it replied."""


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


def error_message(error: AppError | PipelineError | WireError, *, fatal: bool = False) -> dict[str, Any]:
    """The error as the wire says it."""
    return {"kind": "error", "code": error.code, "message": error.message, "next": error.remedy, "fatal": fatal}
