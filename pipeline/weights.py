"""A model folder on disk: `config.json`, one safetensors file per part, and `checksums.json`. Loads strictly."""

import hashlib
import json
from importlib.resources import files
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline.codec import PocketCodec
from pipeline.config import ModelConfig, load_config
from pipeline.errors import PipelineError
from pipeline.student import Student
from pipeline.text import TextEncoder

PARTS = ("codec", "text", "student")


def pocket_folder() -> Path:
    """Where the embedded model lives."""
    return Path(str(files("pipeline.pocket")))


def load_parts(folder: Path) -> tuple[ModelConfig, PocketCodec, TextEncoder, Student]:
    """Build and fill the modules, frozen and in eval mode.

    Raises PipelineError: `config_missing`, `config_invalid`, `weights_missing`, `weights_damaged`, `weights_mismatch`.
    """
    config = load_config(folder / "config.json")
    verify(folder)
    codec = PocketCodec(config.codec)
    text = TextEncoder(config.text, config.student.text_dim)
    student = Student(config.student)
    for name, module in zip(PARTS, (codec, text, student), strict=True):
        _fill(module, folder / f"{name}.safetensors")
    return config, codec, text, student


def verify(folder: Path) -> None:
    """Compare every part with its recorded SHA-256. Raises PipelineError (`weights_missing`, `weights_damaged`)."""
    record = folder / "checksums.json"
    paths = [folder / f"{name}.safetensors" for name in PARTS]
    for path in (record, *paths):
        if not path.is_file():
            raise PipelineError(
                "weights_missing", f"{path} is not there.", "Restore the model folder, or name another one."
            )
    expected = _recorded(record)
    for path in paths:
        if _digest(path) != expected.get(path.name):
            raise PipelineError(
                "weights_damaged",
                f"{path} does not match its checksum.",
                "Restore it: `git checkout` the file, or copy the model folder again.",
            )


def export(folder: Path, config: ModelConfig, codec: nn.Module, text: nn.Module, student: nn.Module) -> None:
    """Write a model folder that `load_parts` reads. Stored in half precision, computed in single."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config.to_json() + "\n")
    digests = {}
    for name, module in zip(PARTS, (codec, text, student), strict=True):
        path = folder / f"{name}.safetensors"
        values = {
            key: value.half() if value.is_floating_point() else value for key, value in module.state_dict().items()
        }
        save_file({key: value.contiguous() for key, value in values.items()}, path)
        digests[path.name] = _digest(path)
    (folder / "checksums.json").write_text(json.dumps(digests, indent=2) + "\n")


def _recorded(record: Path) -> dict[str, str]:
    try:
        expected = json.loads(record.read_text())
    except ValueError:
        expected = None
    if not isinstance(expected, dict):
        raise PipelineError("weights_damaged", f"{record} is not a list of checksums.", "Restore it with its weights.")
    return expected


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fill(module: nn.Module, path: Path) -> None:
    try:
        module.load_state_dict(load_file(path), strict=True)
    except (RuntimeError, SafetensorError) as error:
        raise PipelineError(
            "weights_mismatch",
            f"{path} does not fit its configuration: {str(error).splitlines()[-1].strip().rstrip('.')}.",
            "Take config.json and the weights from the same release.",
        ) from error
    module.eval().requires_grad_(False)
