"""Licences that a person has to say yes to, and each yes, remembered in a small file beside the shelf.

A yes is for one download under one licence: where the table comes to name another licence, it is asked for again.
Knows no hub and no command line.
"""

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from app.errors import AppError
from pipeline.downloads import Download

Given = dict[str, dict[str, str]]  # the name of a download -> the licence, and when


def terms(row: Download) -> str:
    """The licence of a download's weights, and what has to be known of it."""
    if not row.needs_consent:
        return row.licence
    return f"{row.licence}: {'not for commercial use' if row.commercial is False else 'read it first'}"


def accept(file: Path, rows: Iterable[Download]) -> None:
    """Remember a yes for those that want one. Raises AppError (`out_unwritable`)."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    new = {row.name: {"licence": row.licence, "when": now} for row in _asked(file, rows)}
    if not new:
        return
    part = file.with_name(f".{file.name}-{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(_given(file) | new, indent=2) + "\n")
        part.replace(file)
    except OSError as error:
        raise AppError(
            "out_unwritable",
            f"Your yes cannot be kept in {file}: {(error.strerror or str(error)).lower()}.",
            "Name a --models-folder (STILLSTREAM_MODELS) beside which you may write.",
        ) from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def require(file: Path, rows: Iterable[Download]) -> None:
    """Raises AppError (`licence_not_accepted`) if any of them wants a yes that is not remembered."""
    if asked := _asked(file, rows):
        where = ", ".join(dict.fromkeys(f"https://huggingface.co/{row.repo}" for row in asked))
        raise AppError(
            "licence_not_accepted",
            f"A licence wants your yes first: {'; '.join(f'{row.title} ({terms(row)})' for row in asked)}.",
            f"Read it at {where}; if you keep to it, add --accept-licence to pull, convert, serve or generate.",
        )


def _asked(file: Path, rows: Iterable[Download]) -> list[Download]:
    given = _given(file)
    return [row for row in rows if row.needs_consent and given.get(row.name, {}).get("licence") != row.licence]


def _given(file: Path) -> Given:
    """What was said yes to; what cannot be read was not said."""
    try:
        held = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return {name: yes for name, yes in held.items() if isinstance(yes, dict)} if isinstance(held, dict) else {}
