"""A model folder on disk: `config.json`, one safetensors file per part, and `checksums.json`. Loads strictly.

The transformer alone can also be read and written as diffusers does it, from and to local folders.
"""

import hashlib
import json
from importlib.resources import files
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.codec import PocketCodec
from pipeline.config import ModelConfig, StudentConfig, WanModel, load_config
from pipeline.errors import PipelineError
from pipeline.fit import blank, difference
from pipeline.layout import RECORD, difference_of_shape, not_ours
from pipeline.narrow import fill
from pipeline.student import Student
from pipeline.text import TextEncoder

PARTS = ("codec", "text", "student")
_DIFFUSERS_NAME = "diffusion_pytorch_model"


def pocket_folder() -> Path:
    """Where the embedded model lives."""
    return Path(str(files("pipeline.pocket")))


def config_of(model: Path | WanModel | None) -> ModelConfig:
    """How a model is run, before anything of it is loaded; None is the embedded one.

    Raises PipelineError: `config_missing`, `config_invalid`.
    """
    return model.config if isinstance(model, WanModel) else load_config((model or pocket_folder()) / "config.json")


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
    record = folder / RECORD
    paths = [folder / f"{name}.safetensors" for name in PARTS]
    for path in (record, *paths):
        if not path.is_file():
            raise PipelineError(
                "weights_missing", f"{path} is not there.", "Restore the model folder, or name another one."
            )
    expected = _recorded(record)
    for path in paths:
        if digest(path) != expected.get(path.name):
            raise PipelineError(
                "weights_damaged",
                f"{path} does not match its checksum.",
                "Restore it: `git checkout` the file, or copy the model folder again.",
            )


def export(folder: Path, config: ModelConfig, codec: nn.Module, text: nn.Module, student: nn.Module) -> None:
    """Write a model folder that `load_parts` reads. Weights are stored in half precision, statistics in single: a
    variance may be beyond what half precision holds. Computed in single.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config.to_json() + "\n")
    digests = {}
    for name, module in zip(PARTS, (codec, text, student), strict=True):
        path = folder / f"{name}.safetensors"
        weights = {key for key, _ in module.named_parameters()}
        values = {key: value.half() if key in weights else value for key, value in module.state_dict().items()}
        lost = [key for key, value in values.items() if not value.isfinite().all()]
        assert not lost, f"not finite in {path}: {lost}"
        save_file({key: value.contiguous() for key, value in values.items()}, path)
        digests[path.name] = digest(path)
    (folder / RECORD).write_text(json.dumps(digests, indent=2) + "\n")


def save_transformer(folder: Path, student: Student) -> None:
    """Write `config.json` and `diffusion_pytorch_model.safetensors` as diffusers does, in single precision."""
    student.model.save_pretrained(folder)


def load_transformer(
    folder: Path, config: StudentConfig, dtype: torch.dtype = torch.float32, *, bits: int = 16, device: str = "cpu"
) -> Student:
    """A student with the weights of a folder in diffusers' layout. bits: 8 holds those of its layers in bytes.

    Raises PipelineError: `weights_missing`, `weights_damaged`, `weights_mismatch`.
    """
    if told := difference_of_shape(folder, config):
        raise not_ours(folder / "config.json", told)
    values = read_transformer(folder)
    student = blank(config)
    if told := difference(values, student.model.state_dict()):
        raise not_ours(folder, told)
    weights = ((name, values.pop(name)) for name in list(values))
    fill(student.model, weights, dtype, bits=bits, inside="blocks.", device=device)
    return student


def read_transformer(folder: Path) -> dict[str, Tensor]:
    """All weights of a folder in diffusers' layout. Raises PipelineError: `weights_missing`, `weights_damaged`."""
    try:
        # Not diffusers' own reading: it fills what is missing with noise, and wants accelerate for these models.
        return {name: value for path in _pieces(folder) for name, value in load_file(path).items()}
    except (SafetensorError, OSError) as error:
        raise PipelineError(
            "weights_damaged", f"The weights in {folder} cannot be read: {error}.", "Copy the folder again."
        ) from error


def _pieces(folder: Path) -> list[Path]:
    paths = sorted(folder.glob(f"{_DIFFUSERS_NAME}*.safetensors"))
    if not paths:
        raise PipelineError("weights_missing", f"There are no weights in {folder}.", "Name a folder that has some.")
    return paths


def _recorded(record: Path) -> dict[str, str]:
    try:
        expected = json.loads(record.read_text())
    except ValueError:
        expected = None
    if not isinstance(expected, dict):
        raise PipelineError("weights_damaged", f"{record} is not a list of checksums.", "Restore it with its weights.")
    return expected


def digest(path: Path) -> str:
    """SHA-256 of a file; of a transformer's folder, that of the list of its pieces with theirs."""
    if path.is_dir():
        listed = "".join(f"{digest(piece)}  {piece.name}\n" for piece in _pieces(path))
        return hashlib.sha256(listed.encode()).hexdigest()
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
