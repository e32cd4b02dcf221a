"""A run's settings: strict, with a clear word for what does not fit."""

from pathlib import Path

import pytest

from pipeline.errors import PipelineError
from pipeline.training.recipe import run, scaled
from pipeline.training.settings import LoraSettings, TrainSettings, WanSettings, load_settings, read_budget


def written(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text)
    return path


def refused(path: Path) -> PipelineError:
    with pytest.raises(PipelineError) as error:
        load_settings(path)
    return error.value


def test_an_empty_file_is_the_pocket_students_run(tmp_path: Path) -> None:
    assert load_settings(written(tmp_path, "")) == TrainSettings()


def test_a_file_names_only_what_differs(tmp_path: Path) -> None:
    text = '[teacher]\nbudget = "20m"\nclips = 3\n[model]\nname = "mine"\n[model.student]\nnum_layers = 2\n'
    settings = load_settings(written(tmp_path, text))
    assert settings.teacher.budget_s == 1200
    assert settings.teacher.clips == 3
    assert settings.teacher.learning_rate == TrainSettings().teacher.learning_rate
    assert settings.model.student.num_layers == 2
    assert settings.model.codec == TrainSettings().model.codec


def test_an_unknown_key_is_an_error_that_lists_the_known_ones(tmp_path: Path) -> None:
    error = refused(written(tmp_path, "[teacher]\nlerning_rate = 0.1\n"))
    assert error.code == "train_config_invalid"
    assert "'lerning_rate' in [teacher]" in error.message
    assert "learning_rate" in error.remedy
    assert "budget" in error.remedy.split(", ")
    assert "'techer'" in refused(written(tmp_path, "[techer]\n")).message
    assert "in [model.student]" in refused(written(tmp_path, "[model.student]\nlayers = 3\n")).message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[teacher\n", "is not TOML"),
        ('[teacher]\nbudget = "soon"\n', "teacher.budget_s: Value error, 'soon' is not a time like"),
        ("[teacher]\nclips = 0\n", "teacher.clips"),
        ('[student]\nmuon = "perhaps"\n', "student.muon"),
        ("teacher = 3\n", "teacher"),
        ("[model]\nwidth = 333\n", "does not divide into tokens"),
        ("[autoencoder]\nkeep = true\n", "keeps the codec of a start"),
    ],
)
def test_a_value_that_does_not_fit_is_named(tmp_path: Path, text: str, said: str) -> None:
    error = refused(written(tmp_path, text))
    assert error.code == "train_config_invalid"
    assert said in error.message


def test_a_file_that_is_not_there_says_so(tmp_path: Path) -> None:
    assert refused(tmp_path / "none.toml").code == "train_config_missing"


def test_a_budget_is_read_in_seconds_minutes_and_hours() -> None:
    assert [read_budget(text) for text in ("90s", "20m", "1.5h")] == [90, 1200, 5400]
    for text in ("", "45", "-3m", "0s", "soon"):
        with pytest.raises(PipelineError) as error:
            read_budget(text)
        assert error.value.code == "budget_invalid"


def test_another_budget_keeps_the_shares_of_the_stages() -> None:
    whole = TrainSettings()
    half = scaled(whole, (1200 + 4700 + 700) / 2)
    assert half.autoencoder.budget_s == whole.autoencoder.budget_s / 2
    assert half.matching == whole.matching  # it is off
    assert half.teacher.clips == whole.teacher.clips


def test_a_stage_that_does_not_exist_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(PipelineError) as error:
        run(tmp_path / "out", stage="dessert")
    assert error.value.code == "stage_unknown"
    assert not (tmp_path / "out").exists()


def test_a_recipe_chooses_the_run_of_a_wan_model(tmp_path: Path) -> None:
    text = 'recipe = "wan"\n[teacher]\nbudget = "2h"\nbatch = 16\n[model.sampler]\nsteps = [1000, 500]\n'
    settings = load_settings(written(tmp_path, text))
    assert isinstance(settings, WanSettings)
    assert (settings.teacher.budget_s, settings.teacher.batch) == (7200, 16)
    assert settings.model.sampler.steps == (1000, 500)
    assert settings.model.student == WanSettings().model.student
    assert load_settings(written(tmp_path, 'recipe = "pocket"')) == TrainSettings()


def test_what_the_named_folders_say_about_the_model_need_not_be_said_again(
    tmp_path: Path, wan_run: WanSettings
) -> None:
    folders = f'recipe = "wan"\nbeside = "{wan_run.beside}"\ntransformer = "{wan_run.transformer}"\n'
    settings = load_settings(written(tmp_path, folders + "lora = { rank = 8 }\n[model.sampler]\nshift = 5.0\n"))
    assert isinstance(settings, WanSettings)
    assert settings.lora == LoraSettings(rank=8)
    assert settings.model.student == wan_run.model.student
    assert settings.model.text == wan_run.model.text
    assert settings.model.sampler.shift == 5.0


def test_a_transformer_with_the_modules_of_anyflow_is_not_trained(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "AnyFlowFARTransformer3DModel"}')
    error = refused(written(tmp_path, f'recipe = "wan"\ntransformer = "{tmp_path}"\n'))
    assert error.code == "weights_mismatch" and "not trained here" in error.message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('recipe = "cake"\n', "there is no recipe 'cake'"),
        ('recipe = "wan"\n[clips]\n', "there is no key 'clips'"),
        ('recipe = "wan"\n[lora]\nrnk = 3\n', "there is no key 'rnk' in [lora]"),
        ('recipe = "wan"\n[lora]\nrank = 3\n', "name a transformer to begin from"),
        ('recipe = "wan"\nprecision = "fp8"\n', "precision"),
        ('recipe = "wan"\nbeside = 3\n', "beside"),
    ],
)
def test_a_wan_run_is_as_strict(tmp_path: Path, text: str, said: str) -> None:
    error = refused(written(tmp_path, text))
    assert error.code == "train_config_invalid"
    assert said in error.message


def test_muon_is_for_every_weight_and_not_for_thin_layers(tmp_path: Path, wan_run: WanSettings) -> None:
    folders = f'recipe = "wan"\nbeside = "{wan_run.beside}"\ntransformer = "{wan_run.transformer}"\n'
    settings = load_settings(written(tmp_path, folders + "[teacher]\nmuon = true\n"))
    assert isinstance(settings, WanSettings)
    assert settings.teacher.muon
    error = refused(written(tmp_path, folders + "[teacher]\nmuon = true\n[lora]\nrank = 2\n"))
    assert "muon is for the matrices between layers" in error.message


def test_a_wan_run_names_the_folder_that_is_not_there(tmp_path: Path) -> None:
    assert refused(written(tmp_path, 'recipe = "wan"\nbeside = "nowhere"\n')).code == "config_missing"
    assert refused(written(tmp_path, 'recipe = "wan"\ntransformer = "nowhere"\n')).code == "weights_missing"
