"""Errors that travel to the page: a stable code, one clear sentence, and what to do next."""


class WireError(ValueError):
    """Raised for something the remote side sent that cannot be used.

    code: stable snake_case name. message: one sentence, short, never a copy of a large input.
    remedy: what to do next.
    """

    def __init__(self, code: str, message: str, remedy: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.remedy = remedy

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        return type(self), (self.code, self.message, self.remedy)
