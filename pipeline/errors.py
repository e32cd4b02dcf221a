"""Errors that a person can act on: a stable code, one clear sentence, and what to do next."""


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
