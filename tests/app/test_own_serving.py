"""Students of one's own, from a checkpoint or a training run to pictures; and how each wrong thing is told."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from app.cli_models import models, named
from app.clip import read_clip
from app.errors import AppError
from app.generate import generate
from app.shelf import Shelf
from app.worker import LoadEngine
from pipeline.bases import BASES
from pipeline.chunk import Controls
from pipeline.config import CacheConfig, ModelConfig, SamplerConfig, TextConfig, WanModel, load_config
from pipeline.downloads import WAN_TEXT
from pipeline.engine import Engine
from pipeline.errors import PipelineError
from pipeline.layout import RULE
from pipeline.models import family
from pipeline.training.precomputed import UNPROMPTED, write_clip, write_unprompted
from pipeline.training.settings import WanSettings, WanStageSettings, wan_config
from pipeline.training.wan import run_wan
from tests.app.hub import cached
from tests.app.tiny import write_tiny_model
from tests.app.tiny_wan import ROW, SHAPE, checkpoint, repos, shrink_table

TRAINED = replace(
    wan_config(),
    name="mine",
    width=64,
    height=32,
    fps=8,
    chunk=2,
    student=SHAPE,
    text=TextConfig(length=512),
    sampler=SamplerConfig(shift=3.0, prediction="clean", steps=(1000, 500)),
    cache=CacheConfig(sink=2, window=4),
)


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    before = dict(BASES)
    shrink_table()
    yield
    BASES.update(before)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the parts that all students on Wan share."""
    folder = tmp_path_factory.mktemp("hub")
    for repo, files in repos().items():
        if repo != ROW.repo:
            cached(folder, repo, files)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the trainer, two steps in all."""
    folder = tmp_path_factory.mktemp("run")
    draw = torch.Generator().manual_seed(5)
    (folder / "clips").mkdir()
    for name in ("one", "two"):
        latents, text = torch.randn(4, 16, 4, 8, generator=draw), torch.randn(1, 3, SHAPE.text_dim, generator=draw)
        write_clip(folder / "clips" / f"{name}.safetensors", latents, text)
    write_unprompted(folder / "clips" / UNPROMPTED, torch.randn(1, 1, SHAPE.text_dim, generator=draw))
    stage = WanStageSettings(budget_s=1e9, steps=1, batch=1)
    run_wan(
        folder,
        WanSettings(model=TRAINED, data=folder / "clips", precision="fp32", teacher=stage, student=stage),
        threads=1,
    )
    return folder


@pytest.fixture
def shelf(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shelf:
    monkeypatch.setenv("HF_HUB_CACHE", str(hub))
    monkeypatch.setenv("STILLSTREAM_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("COLUMNS", "200")
    return Shelf(hub, tmp_path / "models")


def converted(shelf: Shelf, *more: str, name: str = "mine") -> Path:
    """A checkpoint of one's own, as a folder on the shelf."""
    source = shelf.models.parent / "my.pt"
    source.write_bytes(checkpoint())
    said("convert", str(source), *more, "--out", str(shelf.models / name / "transformer"))
    return shelf.models / name


def said(*words: str) -> str:
    result = CliRunner().invoke(models, words)
    assert result.exit_code == 0, result.exception
    return " ".join(result.output.split())


def chosen(shelf: Shelf, model: str | Path, **how: str) -> WanModel:
    found = named(Path(model), "cpu", accept_licence=True, folders=(shelf.hub, shelf.models), **how)  # type: ignore[arg-type]
    assert isinstance(found, WanModel)
    return found


def refusal(ask: Callable[[], object], code: str) -> AppError | PipelineError:
    with pytest.raises((AppError, PipelineError)) as refused:
        ask()
    assert refused.value.code == code, refused.value.message
    assert "\n" not in refused.value.message
    return refused.value


def words(*given: str) -> Callable[[], None]:
    """A command of `stillstream models`, to be refused."""

    def ask() -> None:
        error = CliRunner().invoke(models, given).exception
        assert error is not None
        raise error

    return ask


def clip(model: WanModel, out: Path, seconds: float) -> int:
    """Pictures that it draws."""
    generate(LoadEngine(model, "cpu", 1), Controls("a red ball"), seconds, out)
    return len(list(read_clip(out, model.config.fps, model.config.width, model.config.height)))


def test_a_converted_checkpoint_draws_like_the_family_that_it_was_converted_for(shelf: Shelf, tmp_path: Path) -> None:
    folder = converted(shelf, "--like", "longlive")
    for model in ("mine", folder, folder / "transformer"):
        found = chosen(shelf, model, size="64x32")
        assert found.transformer == folder / "transformer"
        assert found.config == replace(family("longlive").config(64, 32), name="mine")
    assert chosen(shelf, "mine", size="96x64").config.latent_size == (8, 12)
    assert clip(found, tmp_path / "clip.mp4", 1.0) == 16


def test_a_checkpoint_that_does_not_say_how_it_is_run_is_told_by_like(shelf: Shelf, tmp_path: Path) -> None:
    folder = converted(shelf, "--base", "wan-1.3b")
    error = refusal(lambda: chosen(shelf, folder), "config_missing")
    assert "--like" in error.remedy and "self-forcing" in error.remedy and "krea-realtime" not in error.remedy
    found = chosen(shelf, folder, like="causal-forcing-2step", size="64x32", decoder="full")
    assert (found.config.chunk, found.config.sampler.steps, found.tiny) == (1, (1000, 500), None)
    assert clip(found, tmp_path / "clip.mp4", 0.5) == 8


def test_what_the_trainer_exported_draws_as_it_was_trained(run: Path, shelf: Shelf, tmp_path: Path) -> None:
    for folder in (run / "export", run / "export" / "transformer"):
        found = chosen(shelf, folder)
        assert found.config == TRAINED
    engine = Engine.load(found)
    weights = load_file(run / "export" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(engine.student.model.state_dict()[name], value) for name, value in weights.items())
    assert clip(found, tmp_path / "clip.mp4", 1.0) == TRAINED.fps
    assert chosen(shelf, run / "export", size="96x64").config == replace(TRAINED, width=96, height=64)


def test_a_stage_of_a_run_is_run_as_a_family(run: Path, shelf: Shelf) -> None:
    refusal(lambda: chosen(shelf, run / "student"), "config_missing")
    assert chosen(shelf, run / "student", like="self-forcing").config.chunk == 3


def test_folders_on_the_shelf_are_rows_of_the_list_with_their_origin(run: Path, shelf: Shelf) -> None:
    converted(shelf, "--like", "reward-forcing", name="alpha")
    converted(shelf, "--base", "wan-1.3b", name="beta")
    (shelf.models / "gamma").symlink_to(run / "export")
    write_tiny_model(shelf.models / "delta")
    (shelf.models / "epsilon").mkdir()
    (shelf.models / ".half-written").mkdir()
    listed = said("list")
    assert "alpha 0.0 M 4 3 3 + 3 yours to know converted from my.pt" in listed
    assert "beta config_missing" in listed
    assert "gamma 0.0 M 2 2 2 + 4 yours to know trained" in listed
    assert "delta 0.0 M 4 1 1 + 2 yours to know a model folder" in listed
    assert "epsilon model_unknown" in listed
    assert "half-written" not in listed
    assert named(Path("delta"), "cpu", folders=(shelf.hub, shelf.models)) == shelf.models / "delta"


def test_info_tells_how_a_folder_is_run_and_what_memory_it_wants(run: Path, shelf: Shelf) -> None:
    converted(shelf, "--base", "wan-1.3b")
    assert "it does not say" in said("info", "mine")
    assert "a sink of 3 and a window of 6" in said("info", "mine", "--like", "longlive")
    told = said("info", str(run / "export"))
    for part in (
        "steps 1000, 500; shift 3",
        "source trained",
        "at 64x32",
        "licence yours to know",
        "fits now yes",
    ):
        assert part in told
    assert "at 96x64" in said("info", str(run / "export"), "--size", "96x64")


def test_a_folder_is_verified_by_its_name_and_by_its_path(run: Path, shelf: Shelf) -> None:
    folder = converted(shelf, "--like", "longlive")
    for name in ("mine", str(folder), str(folder / "transformer"), str(run / "export")):
        assert "hashes right" in said("verify", name)
    rule = folder / "transformer" / RULE
    rule.write_text(replace(load_config(rule), fps=12).to_json())
    assert "hashes right" in said("verify", "mine"), "how it is run may be changed"
    next((folder / "transformer").glob("*.safetensors")).write_bytes(b"half")
    refusal(words("verify", "mine"), "weights_damaged")
    refusal(words("verify", str(run / "student")), "weights_missing")


def test_what_is_removed_is_the_folder_on_the_shelf_and_of_a_link_the_link(run: Path, shelf: Shelf) -> None:
    folder = converted(shelf, "--like", "longlive")
    (shelf.models / "linked").symlink_to(run / "export")
    assert "0.1 MB are free" in said("remove", "mine", "--yes")
    assert not folder.exists()
    said("remove", "linked", "--yes")
    assert not (shelf.models / "linked").exists()
    assert (run / "export" / "transformer" / RULE).is_file()
    refusal(words("remove", str(run / "export"), "--yes"), "model_unknown")
    refusal(words("remove", "mine", "--yes"), "model_unknown")
    assert (run / "export" / "transformer" / RULE).is_file()


def test_each_missing_or_wrong_thing_says_what_to_do(run: Path, shelf: Shelf, tmp_path: Path) -> None:
    folder = converted(shelf, "--base", "wan-1.3b")
    export = run / "export"
    assert "no folder" in refusal(lambda: chosen(shelf, tmp_path / "nothing"), "model_unknown").message
    assert "holds no model" in refusal(lambda: chosen(shelf, shelf.models), "model_unknown").message
    checkpoint_told = refusal(lambda: chosen(shelf, tmp_path / "my.pt"), "model_unknown")
    assert "is a file" in checkpoint_told.message and "models convert" in checkpoint_told.remedy
    refusal(lambda: chosen(shelf, folder, like="sora"), "model_unknown")
    large = refusal(lambda: chosen(shelf, folder, like="krea-realtime"), "weights_mismatch")
    assert "attention_head_dim is 12, the model's is 128" in large.message and "self-forcing" in large.remedy
    far = refusal(lambda: chosen(shelf, folder, like="anyflow-far"), "weights_mismatch")
    assert "compressed_patch_size is None, the model's is (1, 4, 4)" in far.message
    refusal(lambda: chosen(shelf, folder, like="pocket"), "model_not_served")
    refusal(lambda: chosen(shelf, export, like="longlive"), "setting_invalid")
    refusal(lambda: chosen(shelf, "longlive", like="longlive"), "setting_invalid")
    refusal(lambda: named(None, "cpu", like="longlive"), "setting_invalid")
    refusal(lambda: chosen(shelf, export, size="70x32"), "size_invalid")
    refusal(lambda: chosen(shelf, export, size="40000x40000"), "memory_short")
    bare = Shelf(tmp_path / "bare", shelf.models)
    missing = refusal(lambda: chosen(bare, export), "model_not_pulled")
    assert "models pull wan-text" in missing.remedy
    cached(bare.hub, WAN_TEXT.repo or "", repos()[WAN_TEXT.repo or ""])
    assert "models pull wan-tiny" in refusal(lambda: chosen(bare, export), "model_not_pulled").remedy
    assert chosen(bare, export, decoder="full").tiny is None


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        ({"chunk": "many"}, "config_invalid", "chunk"),
        ({"pace": 3}, "config_invalid", "pace"),
        ({"student": {**SHAPE.__dict__, "num_layers": 5}}, "weights_mismatch", "num_layers is 2, the model's is 5"),
        ({"codec": {"latent_channels": 16, "spatial_stride": 8}}, "model_not_served", "first_alone"),
    ],
)
def test_a_rule_that_does_not_fit_says_where(
    change: dict[str, object], code: str, said: str, run: Path, shelf: Shelf, tmp_path: Path
) -> None:
    place = tmp_path / "mine" / "transformer"
    place.mkdir(parents=True)
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        (place / name).write_bytes((run / "export" / "transformer" / name).read_bytes())
    (place / RULE).write_text(json.dumps(json.loads(TRAINED.to_json()) | change))
    assert said in refusal(lambda: chosen(shelf, place), code).message


def test_a_transformer_of_another_kind_is_refused(shelf: Shelf, tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text('{"_class_name": "AutoencoderKLWan"}')
    save_file({"x": torch.zeros(1)}, tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    assert "AutoencoderKLWan" in refusal(lambda: chosen(shelf, tmp_path / "vae"), "weights_mismatch").message


def test_convert_wants_a_family_and_a_base_that_agree(shelf: Shelf) -> None:
    shelf.models.mkdir()
    source = shelf.models.parent / "my.pt"
    source.write_bytes(checkpoint())
    out = ("--out", str(shelf.models / "mine"))
    refusal(words("convert", str(source), *out), "setting_invalid")
    refusal(words("convert", str(source), "--like", "longlive"), "setting_invalid")
    refusal(words("convert", str(source), "--like", "longlive", "--base", "wan-14b", *out), "setting_invalid")
    refusal(words("convert", str(source), "--like", "pocket", *out), "model_not_served")
    refusal(words("convert", str(source), "--like", "krea-realtime", *out), "checkpoint_mismatch")
    assert list(shelf.models.iterdir()) == []
    told = said("convert", str(source), "--like", "longlive", *out)
    assert told.endswith(f"Next: stillstream serve --model {shelf.models / 'mine'}")
    assert "Made before" in said("convert", str(source), "--like", "longlive", *out)
    told = said("convert", str(source), "--base", "wan-1.3b", *out)
    assert told.endswith("--like FAMILY") and not (shelf.models / "mine" / RULE).exists()


def test_the_trainers_own_start_is_on_wans_latents() -> None:
    """Nothing has to be said of the model for its export to be served."""
    config: ModelConfig = wan_config()
    assert config.codec == family("self-forcing").config(832, 480).codec
    assert config.regions == family("self-forcing").config(832, 480).regions
