"""A published checkpoint, a file or a folder, -> a folder in diffusers' layout, once, with hashes of what went in and
what came out.

The folder appears whole or not at all. Knows neither the hub nor the table of families.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from torch import Tensor

from pipeline.adapters import merged, read_adapter
from pipeline.checkpoints import read_checkpoint, unwrap
from pipeline.config import ModelConfig, StudentConfig
from pipeline.errors import PipelineError, ran_full
from pipeline.fit import blank, fit
from pipeline.layout import RECORD, RULE, difference_of_shape, not_ours, recorded
from pipeline.weights import digest, read_transformer

_PATTERN = "diffusion_pytorch_model{suffix}.safetensors"
_AGAIN = "Convert or export it again."


def convert(
    source: Path,
    folder: Path,
    shape: StudentConfig,
    *,
    entry: str | None = None,
    sha256: str | None = None,
    dtype: torch.dtype | None = None,
    lora: Path | None = None,
    lora_entry: str | None = None,
    strength: float = 1.0,
    rule: ModelConfig | None = None,
) -> bool:
    """Write `folder` from a checkpoint; False: it was made from this very file before, and is left alone.

    source: a file, or a transformer's folder, in as many pieces as it likes.
    sha256: what the file's has to be. dtype: what to store floating-point weights in, None: as they are.
    lora: low-rank weights to merge in, that strongly. rule: how it is run, written beside the weights.
    Raises PipelineError: those of `read_checkpoint`, of a folder those of `load_transformer`; `checkpoint_hash`,
    `checkpoint_mismatch`, `lora_mismatch`, `disk_full`, `out_unwritable`.
    """
    if source.is_dir():
        if told := difference_of_shape(source, shape):
            raise not_ours(source / "config.json", told)
        held: Mapping[str, Any] = read_transformer(source)
    else:
        held = read_checkpoint(source)
    found = digest(source)
    if sha256 is not None and found != sha256.lower():
        raise PipelineError(
            "checkpoint_hash",
            f"{source} is not the file that was meant: its SHA-256 is {found[:12]}..., not {sha256[:12].lower()}...",
            "Fetch it again, or check where the hash was taken from.",
        )
    made_from: dict[str, Any] = {
        "name": source.name,
        "sha256": found,
        "entry": entry,
        "dtype": str(dtype or "as it is"),
    }
    if lora is not None:
        made_from["lora"] = {"name": lora.name, "sha256": digest(lora), "entry": lora_entry, "strength": strength}
    if rule is not None:
        made_from["rule"] = json.loads(rule.to_json())
    if recorded(folder).get("source") == made_from:
        return False
    weights = fit(unwrap(held, entry, source), shape, source)
    if lora is not None:
        weights = merged(weights, read_adapter(lora, shape, entry=lora_entry), strength)
    weights = {name: _stored(value, dtype) for name, value in weights.items()}
    wanted = sum(value.nbytes for value in weights.values())
    with _no_empty_parents(folder), replacing_folder(folder, wanted) as part:
        save_torch_state_dict(weights, part, filename_pattern=_PATTERN)
        blank(shape).model.save_config(part)
        seal(part, made_from, rule)
    return True


def _stored(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    return (value if dtype is None or not value.is_floating_point() else value.to(dtype)).contiguous()


@contextmanager
def _no_empty_parents(folder: Path) -> Iterator[None]:
    """Of the folders that are made around this one none stays that is empty when the block ends."""
    made = [each for each in folder.absolute().parents if not os.path.exists(each)]  # the innermost first
    try:
        yield
    finally:
        for each in made:
            with suppress(OSError):  # something is in it
                each.rmdir()


@contextmanager
def replacing_folder(folder: Path, wanted: int) -> Iterator[Path]:
    """A folder to fill, beside the one whose place it takes when the block ends well; it is gone otherwise.

    wanted: bytes that it will hold. Raises PipelineError: `disk_full`, `out_unwritable`.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder.parent).free
        if free < wanted:
            raise _disk_full(folder, f"{wanted / 1e9:.1f} GB are to be written, {free / 1e9:.1f} GB are free")
        part = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        yield part
        part.chmod(0o755)
        if folder.exists():
            # Two renames are never one; the old one goes back if the second fails.
            old = part.with_name(part.name + "-old")
            folder.rename(old)
            try:
                part.rename(folder)
            except OSError:
                old.rename(folder)
                raise
            shutil.rmtree(old)
        else:
            part.rename(folder)
    except (OSError, SafetensorError) as error:
        raise _unwritable(folder, error) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _unwritable(folder: Path, error: OSError | SafetensorError) -> PipelineError:
    if ran_full(error):
        return _disk_full(folder, "the disk ran full, or a quota was reached")
    why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return PipelineError(
        "out_unwritable", f"{folder} cannot be written: {why.lower()}.", "Name a folder that you may write to."
    )


def _disk_full(folder: Path, why: str) -> PipelineError:
    return PipelineError(
        "disk_full",
        f"There is no room for {folder}: {why}. Nothing was left there.",
        "Make room, or name another disk.",
    )


def seal(folder: Path, source: dict[str, Any], rule: ModelConfig | None = None) -> None:
    """Write beside a transformer what it was made from, the hashes of its files, and how it is run.

    The rule has no hash: whoever likes may change it.
    """
    digests = {path.name: digest(path) for path in sorted(folder.iterdir()) if path.name not in (RECORD, RULE)}
    (folder / RECORD).write_text(json.dumps({"source": source, "files": digests}, indent=2) + "\n")
    if rule is not None:
        (folder / RULE).write_text(rule.to_json() + "\n")


def verify(folder: Path) -> None:
    """Compare a converted folder with its record. Raises PipelineError: `weights_missing`, `weights_damaged`."""
    files = recorded(folder).get("files")
    if not isinstance(files, dict) or not files:
        raise PipelineError("weights_missing", f"{folder} has no record of hashes.", _AGAIN)
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise PipelineError("weights_missing", f"{path} is not there.", _AGAIN)
        if digest(path) != expected:
            raise PipelineError("weights_damaged", f"{path} does not match its checksum.", _AGAIN)
