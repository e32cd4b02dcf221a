"""Errors that a person can act on: a stable code, one clear sentence, and what to do next."""

import errno
import re

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NUMBER = re.compile(r"os error (\d+)")  # how libraries in Rust, as safetensors and hf-xet, say errno


class PipelineError(ValueError):
    """Raised for a caller's mistake or a damaged file.

    code: stable snake_case name. message: one sentence with the value received. remedy: what to do next.
    """

    def __init__(self, code: str, message: str, remedy: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.remedy = remedy

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        return type(self), (self.code, self.message, self.remedy)


def ran_full(error: BaseException) -> bool:
    """Whether a write failed for want of room on a disk, or of a quota; also where another error hides that one."""
    told = _NUMBER.search(str(error))
    number = int(told[1]) if told else getattr(error, "errno", None)
    within = error.__cause__ or error.__context__
    return number in _NO_ROOM or (within is not None and ran_full(within))
