"""A probe that a person names, read from its file. Knows nothing of what it is asked."""

from pathlib import Path

from safetensors import SafetensorError

from app.errors import AppError
from pipeline.training.probe import Probe, load_probe


def read_probe(path: Path) -> Probe:
    """Raises AppError (`probe_unreadable`)."""
    try:
        return load_probe(path)
    except (OSError, RuntimeError, SafetensorError) as error:
        what = "is not there" if isinstance(error, FileNotFoundError) else "is not a probe"
        raise AppError(
            "probe_unreadable", f"{path} {what}.", "Name a probe's .safetensors, or leave --probe out."
        ) from error
