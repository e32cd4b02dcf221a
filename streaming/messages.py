"""The messages that a page may send, read from text.

Knows shapes, sizes and ranges that hold for every model. Does not know what a prompt means, nor which
session a message is for.
"""

import unicodedata
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails, from_json

from streaming.errors import WireError
from streaming.picture import PICTURE_BYTES, too_large

__all__ = [
    "CandidateMessage",
    "ControlsMessage",
    "Message",
    "OfferMessage",
    "PictureMessage",
    "PingMessage",
    "ResetMessage",
    "WireError",
    "parse",
]

MESSAGE_BYTES = 8 * 1024
OFFER_BYTES = 64 * 1024
PICTURE_TEXT_BYTES = PICTURE_BYTES * 4 // 3 + 1024  # in base64, and the message around it
MOST_BYTES = 1 << 20  # of anything, before its kind is known
PROMPT_LIMIT = 300
TILES_LIMIT = 4096

# The largest integer that JavaScript holds exactly: ids are echoed and must come back unchanged.
Id = Annotated[int, Field(ge=0, le=2**53 - 1)]


class _Message(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class OfferMessage(_Message):
    """The page's session description."""

    kind: Literal["offer"]
    sdp: Annotated[str, Field(min_length=1)]


class CandidateMessage(_Message):
    """One of the page's ICE candidates; null or empty ends the list."""

    kind: Literal["candidate"]
    candidate: str | None
    sdpMid: str | None = None
    sdpMLineIndex: Annotated[int, Field(ge=0, le=255)] | None = None


class ControlsMessage(_Message):
    """A change of what to draw; a field that is absent or null stays as it is."""

    kind: Literal["controls"]
    id: Id
    prompt: str | None = None
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    strength: Annotated[float, Field(ge=0, le=1)] | None = None
    structure: Annotated[float, Field(ge=0, le=1)] | None = None
    regions: Annotated[float, Field(ge=0, le=1)] | None = None
    paint: Annotated[str, Field(max_length=TILES_LIMIT, pattern=r"^(?:[01]*1[01]*)?$")] | None = None
    transition: Literal["cut", "glide", "recache"] | None = None
    glide_chunks: Annotated[int, Field(ge=1, le=64)] | None = None
    steps: Annotated[int, Field(ge=0, le=32)] | None = None
    lora: Annotated[str, Field(max_length=200)] | None = None
    lora_strength: Annotated[float, Field(ge=0, le=4)] | None = None
    motion_aware: bool | None = None
    paused: bool | None = None
    camera: bool | None = None


class PictureMessage(_Message):
    """The picture that the stream is to begin with: a file in base64; null: none any more."""

    kind: Literal["picture"]
    id: Id
    data: str | None


class ResetMessage(_Message):
    """Start the stream again from its seed."""

    kind: Literal["reset"]
    id: Id


class PingMessage(_Message):
    """Asks for a pong with the same id."""

    kind: Literal["ping"]
    id: Id


Message = OfferMessage | CandidateMessage | ControlsMessage | PictureMessage | ResetMessage | PingMessage

KINDS = ("offer", "candidate", "controls", "picture", "reset", "ping")

_ADAPTER: TypeAdapter[Message] = TypeAdapter(Annotated[Message, Field(discriminator="kind")])


def parse(text: str, prompt_limit: int = PROMPT_LIMIT) -> Message:
    """Read one message.

    Raises WireError (`message_too_large`, `json_invalid`, `kind_unknown`, `field_missing`, `field_invalid`,
    `prompt_too_long`, `picture_too_large`) and nothing else.
    """
    raw = _read_json(text)
    try:
        message = _ADAPTER.validate_python(raw)
    except ValidationError as error:
        raise _explain(error.errors(include_url=False, include_context=False)[0]) from None
    if isinstance(message, ControlsMessage) and message.prompt is not None:
        _check_prompt(message.prompt, prompt_limit)
    return message


def _read_json(text: str) -> dict[str, Any]:
    # Characters are counted first, so that a huge text is refused before it is copied.
    if len(text) > MOST_BYTES:
        raise _too_large(MOST_BYTES)
    try:
        data = text.encode()
        raw = from_json(data, allow_inf_nan=False)
    except ValueError:
        if len(text) > OFFER_BYTES:
            raise _too_large(OFFER_BYTES) from None
        raise WireError("json_invalid", "The message is not valid JSON.", "Send one JSON object as text.") from None
    if not isinstance(raw, dict):
        raise WireError("json_invalid", "The message is not a JSON object.", "Send one JSON object as text.")
    if raw.get("kind") == "picture":
        if len(data) > PICTURE_TEXT_BYTES:
            raise too_large()
        return raw
    limit = OFFER_BYTES if raw.get("kind") == "offer" else MESSAGE_BYTES
    if len(data) > limit:
        raise _too_large(limit)
    return raw


def _too_large(limit: int) -> WireError:
    return WireError("message_too_large", f"The message is larger than {limit // 1024} KiB.", "Send a shorter one.")


def _explain(error: ErrorDetails) -> WireError:
    kinds = ", ".join(KINDS)
    if error["type"] == "union_tag_invalid":
        return WireError("kind_unknown", "The message has an unknown kind.", f"Use one of: {kinds}.")
    if error["type"] == "union_tag_not_found":
        return WireError("field_missing", "The message has no kind.", f"Set `kind` to one of: {kinds}.")
    # The first place is the kind, which the union adds.
    field = _name(error["loc"][1:])
    if error["type"] == "missing":
        return WireError("field_missing", f"The field `{field}` is missing.", "Add it.")
    if error["type"] == "extra_forbidden":
        return WireError("field_invalid", f"The field `{field}` is not known.", "Leave it out.")
    return WireError("field_invalid", f"The field `{field}` is wrong: {error['msg']}.", "Correct it.")


def _name(location: Sequence[int | str]) -> str:
    return ".".join(str(place) for place in location)[:40]


def _check_prompt(prompt: str, limit: int) -> None:
    if len(prompt) > limit:
        raise WireError(
            "prompt_too_long",
            f"The prompt has {len(prompt)} characters, the limit is {limit}.",
            "Shorten the prompt.",
        )
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in prompt):
        raise WireError(
            "field_invalid", "The field `prompt` holds control characters.", "Use plain text on a single line."
        )
