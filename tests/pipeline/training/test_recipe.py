"""The whole recipe on a tiny model: from nothing to an export that streams, and on from there."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.chunk import Controls
from pipeline.config import ModelConfig
from pipeline.engine import Engine
from pipeline.errors import PipelineError
from pipeline.structure import CHANNELS
from pipeline.student import Student
from pipeline.training.captions import WORDS
from pipeline.training.recipe import begin, run
from pipeline.training.settings import (
    AutoencoderSettings,
    ClipSettings,
    MatchingSettings,
    StudentSettings,
    TeacherSettings,
    TrainSettings,
)
from pipeline.training.teacher import GATE_START
from pipeline.weights import export, load_parts

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning"),
]
PROMPT = "a red ball on the beach"


@pytest.fixture(scope="module", autouse=True)
def no_compiler() -> Iterator[None]:
    """Compiling takes longer than these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", "")
        yield


@pytest.fixture(scope="module")
def settings(config: ModelConfig) -> TrainSettings:
    student = replace(config.student, in_channels=8 + CHANNELS, out_channels=8 + 1)
    model = replace(
        config,
        width=192,
        height=128,
        examples=(PROMPT,),
        student=student,
        codec=replace(config.codec, latent_channels=8),
        text=replace(config.text, length=24, words=WORDS),
        sampler=replace(config.sampler, prediction="gated"),
    )
    return TrainSettings(
        model=model,
        autoencoder=AutoencoderSettings(steps=2, batch=2),
        clips=ClipSettings(openings=4, clips=3),
        teacher=TeacherSettings(steps=3, openings=2, clips=2, muon=True),
        student=StudentSettings(steps=2, openings=2, clips=2, longest=5, muon=True),
        matching=MatchingSettings(on=True, steps=2, streams=2, longest=5, critic_alone=1, muon=True),
    )


@pytest.fixture(scope="module")
def trained(no_compiler: None, settings: TrainSettings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    run(folder, settings)
    return folder


def test_the_recipe_ends_in_a_model_that_streams_with_its_card(trained: Path) -> None:
    engine = Engine.load(trained / "export")
    chunk = engine.step(engine.open(1), Controls(PROMPT, 1))
    assert chunk.frames_THWC.shape == (8, 128, 192, 3)
    told = (trained / "export" / "README.md").read_text()
    assert all(f"| {stage} |" in told for stage in ("autoencoder", "teacher", "student", "matching"))
    assert json.loads((trained / "export" / "training.json").read_text())["teacher"]["steps"] == 3


def test_the_same_command_finds_everything_done(trained: Path, settings: TrainSettings) -> None:
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("checkpoint.pt")}
    run(trained, settings)
    assert len(before) == 4
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("checkpoint.pt")} == before


def test_a_run_can_begin_with_the_weights_of_a_model(trained: Path, settings: TrainSettings, tmp_path: Path) -> None:
    export = trained / "export"
    later = replace(
        settings,
        start=str(export),
        autoencoder=replace(settings.autoencoder, keep=True),
        teacher=replace(settings.teacher, steps=1, learning_rate=1e-9, ema=0.0),
    )
    run(tmp_path, later, stage="teacher")
    assert not (tmp_path / "autoencoder").exists()
    _, _, text, student = load_parts(export)
    made = torch.load(tmp_path / "teacher" / "checkpoint.pt", weights_only=True)["module"]
    for name, value in student.state_dict().items():
        torch.testing.assert_close(made[f"student.{name}"], value, atol=1e-6, rtol=0)
    torch.testing.assert_close(made["text.table.weight"], text.table.weight, atol=1e-6, rtol=0)


def test_a_student_that_keeps_to_its_start_needs_no_teacher(
    trained: Path, settings: TrainSettings, tmp_path: Path
) -> None:
    for part in ("openings", "clips"):
        (tmp_path / part).symlink_to(trained / part)
    later = replace(
        settings,
        start=str(trained / "export"),
        autoencoder=replace(settings.autoencoder, keep=True),
        model=replace(settings.model, sampler=replace(settings.model.sampler, anchored=0.75)),
        student=replace(settings.student, target="start", anchored=0.5),
        matching=replace(settings.matching, on=False),
    )
    run(tmp_path, later)
    assert not (tmp_path / "teacher").exists()
    assert Engine.load(tmp_path / "export").config.sampler.anchored == 0.75


def test_a_model_with_other_words_gives_all_but_its_text_encoder(trained: Path, settings: TrainSettings) -> None:
    words = replace(settings.model.text, words=("cat", "dog"))
    codec, weights = begin(str(trained / "export"), replace(settings.model, text=words))
    assert codec is not None and weights is not None
    assert {name.split(".")[0] for name in weights} == {"student"}


def test_a_model_that_knows_no_structure_gets_the_channels_for_it(trained: Path, settings: TrainSettings) -> None:
    model, size = settings.model, settings.model.student
    bare = replace(model, student=replace(size, in_channels=size.in_channels - CHANNELS, control_channels=0))
    torch.manual_seed(5)
    student = Student(bare.student)
    _, codec, text, _ = load_parts(trained / "export")
    export(trained / "bare", bare, codec, text, student)
    weights = begin(str(trained / "bare"), model)[1]
    assert weights is not None
    grown = Student(size)
    grown.load_state_dict({name.removeprefix("student."): v for name, v in weights.items() if "student." in name})
    latents = torch.randn(1, model.chunk, model.codec.latent_channels, *model.latent_size)
    control = torch.rand(1, model.chunk, CHANNELS, *model.latent_size)
    torch.testing.assert_close(grown.embed(latents, control), student.embed(latents), atol=2e-3, rtol=0)


def test_a_model_without_a_gate_gets_one_that_is_nearly_shut(trained: Path, settings: TrainSettings) -> None:
    model, size = settings.model, settings.model.student
    plain = replace(model, student=replace(size, out_channels=8), sampler=replace(model.sampler, prediction="clean"))
    torch.manual_seed(5)
    student = Student(plain.student)
    _, codec, text, _ = load_parts(trained / "export")
    export(trained / "plain", plain, codec, text, student)
    weights = begin(str(trained / "plain"), model)[1]
    assert weights is not None
    grown = Student(size)
    grown.load_state_dict({name.removeprefix("student."): v for name, v in weights.items() if "student." in name})
    tokens, like = torch.randn(1, 12, size.num_attention_heads * size.attention_head_dim), torch.zeros(1, 2, 8, 4, 6)
    modulation = torch.randn(1, 1, 2, tokens.shape[-1])
    with torch.no_grad():
        clean, gate = grown.head(tokens, modulation, like).split((8, 1), 2)
        torch.testing.assert_close(clean, student.head(tokens, modulation, like), atol=2e-3, rtol=0)
    assert torch.equal(gate, torch.full_like(gate, GATE_START))


def test_a_model_of_other_sizes_cannot_be_begun_with(trained: Path, settings: TrainSettings) -> None:
    other = replace(settings.model, student=replace(settings.model.student, num_attention_heads=3))
    with pytest.raises(PipelineError) as refused:
        begin(str(trained / "export"), other)
    assert refused.value.code == "start_of_another_model"
    assert begin(None, other) == (None, None)
