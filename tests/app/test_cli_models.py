"""`stillstream models` as a person uses it, on a hub cache of tiny files."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save
from typer.testing import CliRunner, Result

from app.cli_models import models, named
from app.errors import AppError
from pipeline.bases import BASES, CodecWeights, TextWeights
from pipeline.convert import convert
from pipeline.downloads import WAN_TEXT, WAN_TINY
from pipeline.errors import PipelineError
from pipeline.memory import Setup, plan, ways
from pipeline.models import FAMILIES, family
from pipeline.student import Student
from tests.app.hub import cached
from tests.app.test_shelf import BYTES, tiny
from tests.app.tiny import write_tiny_model

PARTS_ON_DISK = {
    WAN_TEXT.repo or "": {
        "text_encoder/config.json": b"{}",
        "tokenizer/tokenizer.json": b"{ }",
        "vae/config.json": b"{  }",
    },
    WAN_TINY.repo or "": {WAN_TINY.files[0]: b"weights"},
}


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("STILLSTREAM_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def said(*words: str, answer: str | None = None) -> str:
    result = run(*words, answer=answer)
    assert result.exit_code == 0, result.exception
    return " ".join(result.output.split())


def run(*words: str, answer: str | None = None) -> Result:
    return CliRunner().invoke(models, words, input=answer)


def code(*words: str) -> str:
    error = run(*words).exception
    assert isinstance(error, AppError | PipelineError), error
    return error.code


def test_the_list_has_every_family_with_its_licence_and_what_is_here(folders: Path) -> None:
    text = said("list")
    assert all(row.name in text for row in FAMILIES)
    assert "embedded" in text and "pulled" not in text
    row = family("self-forcing")
    cached(folders / "hub", row.repo or "", {row.files[0]: BYTES})
    assert "pulled" in said("list")


def test_info_tells_source_licence_memory_and_what_is_not_verified() -> None:
    text = said("info", "causal-forcing-2step", "--size", "512x512")
    for part in ("zhuhz22/Causal-Forcing", "1,419 million", "512x512", "1000, 500", "first chunk 4", "read it first"):
        assert part in text
    assert "not verified licence" in text
    assert "fits now yes, all on the CPU" in said("info", "pocket")
    assert "fits now no. Choose a smaller model" in said("info", "krea-realtime", "--size", "4096x4096")


def test_info_reckons_with_bits_decoder_and_workers() -> None:
    assert "student 5.7 GB" in said("info", "longlive") and "text encoder 11.4 GB" in said("info", "longlive")
    small = said("info", "longlive", "--text-bits", "8", "--bits", "8", "--decoder", "full")
    assert "student 1.5 GB" in small and "text encoder 6.7 GB" in small and "decoder full" in small
    setup = Setup(width=832, height=480, cpu=True, tiny=True, workers=3)
    assert plan(family("longlive"), setup).wants in said("info", "longlive", "--workers", "3")
    assert code("info", "longlive", "--text-bits", "4") == "setting_invalid"
    assert code("info", "longlive", "--bits", "4") == "setting_invalid"
    assert code("info", "longlive", "--decoder", "best") == "setting_invalid"


def test_info_tells_of_every_way_what_it_takes_and_whether_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = ways(family("longlive"), Setup(width=832, height=480, tiny=True))
    free, host_free = plans[2].device, plans[3].host
    monkeypatch.setattr("app.shelf.psutil.virtual_memory", lambda: SimpleNamespace(available=host_free))
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (free, 2 * free))
    text = said("info", "longlive", "--device", "cuda")
    assert "fits now no. Add --text-bits 8, which fits." in text
    for index, each in enumerate(plans):
        assert f"{each.title}: {each.wants}, {'too much' if index < 2 else 'fits'}" in text
    assert "fits now yes, all on the GPU" in said("info", "longlive", "--device", "cuda", "--text-bits", "8")


def test_info_counts_the_autoencoder_beside_a_tiny_file_that_cannot_encode(folders: Path) -> None:
    def told(*names: str) -> str:
        file = save({name: torch.zeros(1) for name in names})
        cached(folders / "hub", WAN_TINY.repo or "", {WAN_TINY.files[0]: file})
        text = said("info", "longlive")
        shutil.rmtree(folders / "hub")
        return text

    assert "codec 45.3 MB" in said("info", "longlive")
    assert "codec 45.3 MB" in told("encoder.0.weight", "decoder.1.weight")
    assert "codec 0.5 GB" in told("decoder.1.weight")


def test_info_tells_the_way_that_a_text_device_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def told(device: str) -> tuple[int, int]:
        if device not in ("cuda", "cuda:1"):
            raise RuntimeError("invalid device")
        return {"cuda": 9, "cuda:1": 12}[device] * 10**9, 0

    monkeypatch.setattr("torch.cuda.mem_get_info", told)
    monkeypatch.setattr("app.shelf.psutil.virtual_memory", lambda: SimpleNamespace(available=30 * 10**9))
    gpu = ("info", "longlive", "--device", "cuda", "--text-device")
    assert "fits now yes, text encoder on the CPU" in said(*gpu, "auto")
    assert "fits now yes, text encoder swapped" in said(*gpu, "swap")
    apart = said(*gpu, "cuda:1")
    assert "fits now yes, text encoder on cuda:1" in apart
    assert "and 30.0 GB in the machine, 12.0 GB on the text encoder's device" in apart
    assert "ways all on the GPU: 18.4 GB, too much" in said(*gpu, "cuda:0")  # the same as cuda
    assert "fits now yes, text encoder on cuda:1" in said("info", "longlive", "--text-device", "cuda:1")
    for unknown in ("cuda:2", "gpu", "swapped"):
        assert code(*gpu, unknown) == "device_unusable"


def test_info_and_verify_take_a_folder_of_your_own(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_model(folders / "mine")
    assert "tiny: 64x32 at 16 fps" in said("info", str(folders / "mine"))
    assert "hashes right" in said("verify", str(folders / "mine"))
    student = tiny(family("self-forcing"), monkeypatch)
    torch.save(dict(student.model.state_dict()), folders / "c.pt")
    convert(folders / "c.pt", folders / "transformer", student.config)
    assert "diffusers' layout" in said("info", str(folders / "transformer"))
    assert "hashes right" in said("verify", str(folders / "transformer"))
    next((folders / "transformer").glob("*.safetensors")).write_bytes(b"half")
    assert code("verify", str(folders / "transformer")) == "weights_damaged"


def test_a_checkpoint_of_your_own_is_converted_with_its_hash(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student: Student = tiny(family("self-forcing"), monkeypatch)
    torch.save({"generator": dict(student.model.state_dict())}, folders / "c.pt")
    words = ("convert", str(folders / "c.pt"), "--base", "wan-1.3b", "--out", str(folders / "own" / "transformer"))
    assert said(*words, "--half").startswith("Made ")
    assert "Made before" in said(*words, "--half")
    assert code(*words, "--sha256", "0" * 64) == "checkpoint_hash"
    assert code("convert", str(folders / "c.pt")) == "setting_invalid"
    assert code("convert", str(folders / "c.pt"), "--base", "flux", "--out", "x") == "setting_invalid"
    assert code(*words, "--strength", "nan") == "setting_invalid"
    assert code("convert", str(folders / "d.pt"), *words[2:]) == "model_unknown"
    assert code("convert", "longlive", *words[2:]) == "setting_invalid"  # a row says itself how it is converted


def test_a_model_goes_from_pull_to_removal(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = family("krea-realtime")
    student = tiny(row, monkeypatch)
    cached(folders / "hub", row.repo or "", {row.files[0]: save(dict(student.model.state_dict()))})
    assert code("pull", row.name, "--offline") == "licence_not_accepted"
    assert code("convert", row.name) == "licence_not_accepted"
    assert code("pull", row.name, "--offline", "--accept-licence") == "model_not_pulled"
    for repo, files in PARTS_ON_DISK.items():
        cached(folders / "hub", repo, files)
    assert said("pull", row.name, "--offline").count("hashes right") == 4  # the yes is remembered
    assert "Made " in said("convert", row.name)
    assert "converted" in said("list")
    assert said("verify", row.name).count("right") == 2 + 4
    assert said("verify", "wan-tiny").count("right") == 1
    said("remove", row.name, answer="n\n")
    assert "converted" in said("list")
    assert "free again" in said("remove", row.name, "--yes")
    assert "converted" not in said("list")
    assert code("verify", row.name) == "model_not_pulled"
    assert "wan-tiny (here)" in said("list")  # what others share stays until it is named
    said("remove", "wan-text", "--yes")
    assert "wan-text (not here), wan-vae (here)" in said("list")


def test_a_pull_asks_for_all_licences_before_anything_is_fetched(folders: Path) -> None:
    refused = run("pull", "self-forcing", "--offline").exception
    assert isinstance(refused, AppError) and refused.code == "licence_not_accepted"
    assert WAN_TINY.title in refused.message
    assert family("self-forcing").title not in refused.message
    assert not (folders / "hub").exists()


def test_convert_takes_the_yes_too(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = family("krea-realtime")
    cached(folders / "hub", row.repo or "", {row.files[0]: save(dict(tiny(row, monkeypatch).model.state_dict()))})
    assert code("convert", row.name) == "licence_not_accepted"
    assert "Made " in said("convert", row.name, "--accept-licence")
    assert "Made before" in said("convert", row.name)


def test_the_embedded_student_is_whole_and_wrong_words_have_their_answers() -> None:
    assert "pocket: whole" in said("verify", "pocket")
    assert "nothing to fetch" in said("pull", "pocket")
    assert code("info", "sora") == "model_unknown"
    assert code("pull", "sora") == "model_unknown"
    assert code("info", "longlive", "--size", "big") == "setting_invalid"
    assert code("info", "longlive", "--size", "830x480") == "size_invalid"
    assert code("info", "longlive", "--device", "cuda:99") == "device_unusable"
    assert code("convert", "pocket") == "model_not_convertible"


def test_a_model_that_fits_only_with_an_8_bit_text_encoder_is_refused_without_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free = plan(family("longlive"), Setup(width=832, height=480, cpu=True, tiny=True)).device - 10**9
    monkeypatch.setattr("app.shelf.psutil.virtual_memory", lambda: SimpleNamespace(available=free))
    with pytest.raises(PipelineError) as refused:
        named(Path("longlive"), "cpu")
    assert refused.value.code == "memory_short"
    assert refused.value.remedy == "Add --text-bits 8, which fits."
    with pytest.raises(AppError) as fits:
        named(Path("longlive"), "cpu", text_bits=8)
    assert fits.value.code == "model_not_converted"


def test_workers_and_low_rank_weights_count(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lora = folders / "style.safetensors"
    lora.write_bytes(bytes(1000))
    free = plan(family("longlive"), Setup(width=832, height=480, cpu=True, tiny=True)).device
    monkeypatch.setattr("app.shelf.psutil.virtual_memory", lambda: SimpleNamespace(available=free))
    with pytest.raises(AppError):
        named(Path("longlive"), "cpu")
    for loras, workers in (([lora], 1), ([], 2)):
        with pytest.raises(PipelineError) as refused:
            named(Path("longlive"), "cpu", loras=loras, workers=workers)
        assert refused.value.code == "memory_short"


def test_serving_a_name_reckons_memory_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert named(None, "cpu") is None
    assert named(Path("pocket"), "cpu") is None
    write_tiny_model(tmp_path / "mine")
    assert named(tmp_path / "mine", "cpu") == tmp_path / "mine"
    with pytest.raises(PipelineError) as refused:
        named(Path("streamdiffusion-v2-14b"), "cpu")
    assert refused.value.code == "memory_short"
    tiny(family("longlive"), monkeypatch)
    monkeypatch.setitem(BASES, "wan-1.3b", replace(BASES["wan-1.3b"], codec=CodecWeights(0), text=TextWeights()))
    with pytest.raises(AppError) as not_yet:
        named(Path("longlive"), "cpu")
    assert not_yet.value.code == "model_not_converted"
