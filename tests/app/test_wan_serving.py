"""A family from a hub on this machine to pictures: pull, convert, verify, serve; and what each missing part says."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from app import shelf as shelves
from app.cli_models import named
from app.clip import read_clip
from app.errors import AppError
from app.generate import generate
from app.shelf import Shelf
from app.stopwatch import Stopwatch
from app.worker import LoadEngine
from pipeline.chunk import Controls
from pipeline.config import WanModel
from pipeline.downloads import WAN_TEXT, WAN_TINY
from pipeline.errors import PipelineError
from pipeline.models import BASES
from tests.app.hub import cached, serving
from tests.app.tiny_wan import ROW, repos, shrink_table, tiny_codec
from tests.pipeline.published import peft_lora


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BASES, "wan-1.3b", BASES["wan-1.3b"])  # put back afterwards
    shrink_table()


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path / "hub", tmp_path / "models")


def chosen(shelf: Shelf, *, name: str = ROW.name, size: str = "64x32", decoder: str = "tiny") -> WanModel:
    found = named(Path(name), "cpu", size=size, decoder=decoder, folders=(shelf.hub, shelf.models))
    assert isinstance(found, WanModel)
    return found


def refusal(shelf: Shelf, **how: str) -> AppError | PipelineError:
    with pytest.raises((AppError, PipelineError)) as refused:
        chosen(shelf, **how)
    assert "\n" not in refused.value.message
    return refused.value


def test_a_family_goes_from_the_hub_to_a_clip(shelf: Shelf, tmp_path: Path) -> None:
    with serving(repos()) as endpoint:
        for part in shelves.whole(ROW):
            shelves.pull(shelf, part, accepted=False, endpoint=endpoint)
    assert all(shelf.is_pulled(part) for part in shelves.whole(ROW))
    assert not list(shelf.hub.rglob("transformer*")), "what nobody asks for stays on the hub"
    assert shelves.convert(shelf, ROW, half=False)
    shelves.verify(shelf.converted(ROW))
    for decoder in ("tiny", "full"):
        model = chosen(shelf, decoder=decoder)
        assert (model.tiny is not None) == (decoder == "tiny")
        assert model.config.pictures(0) == 9
        out = tmp_path / f"{decoder}.mp4"
        unknown = generate(LoadEngine(model, "cpu", 1), Controls("a red ball"), 1.0, out)
        assert unknown == ()
        assert len(list(read_clip(out, 16, 64, 32))) == 16
    assert len(list(shelf.prompts.rglob("*.safetensors"))) == 1  # read once for both


def test_a_clip_may_begin_with_a_picture_and_follow_a_video(shelf: Shelf, tmp_path: Path) -> None:
    for repo, files in repos().items():
        cached(shelf.hub, repo, files)
    shelves.convert(shelf, ROW, half=True)
    load = LoadEngine(chosen(shelf), "cpu", 1)
    generate(load, Controls("a red ball"), 2.0, tmp_path / "one.mp4")
    for image, clip in ((tmp_path / "one.mp4", None), (None, tmp_path / "one.mp4")):
        generate(load, Controls("a blue ball", strength=0.5), 1.5, tmp_path / "two.mp4", image=image, clip=clip)
        assert len(list(read_clip(tmp_path / "two.mp4", 16, 64, 32))) == 24


def test_a_source_is_encoded_by_the_tiny_encoder_and_by_the_autoencoder_where_the_file_has_none(shelf: Shelf) -> None:
    everything = repos()
    for repo, files in everything.items():
        cached(shelf.hub, repo, files)
    shelves.convert(shelf, ROW, half=False)
    controls = Controls("a red ball", strength=0.0)
    source = np.random.default_rng(0).integers(0, 256, (12, 32, 64, 3), dtype=np.uint8)

    def kept(decoder: str) -> np.ndarray:
        engine = LoadEngine(chosen(shelf, decoder=decoder), "cpu", 1)(Stopwatch().trace)
        state = engine.open(controls.seed)
        latents = [engine.step(state, controls, source).latents_TCHW for _ in range(2)]
        assert all(np.isfinite(each).all() for each in latents)
        return np.concatenate(latents)

    full, tiny = kept("full"), kept("tiny")
    assert tiny.shape == full.shape == (6, 16, 4, 8)
    assert np.abs(tiny - full).max() > 0.1
    chosen(shelf).tiny.write_bytes(tiny_codec(encodes=False))
    np.testing.assert_allclose(kept("tiny"), full, atol=1e-5)


def test_low_rank_weights_are_worn_live_and_exchanged_between_chunks(shelf: Shelf, tmp_path: Path) -> None:
    for repo, files in repos().items():
        cached(shelf.hub, repo, files)
    shelves.convert(shelf, ROW, half=False)
    paths = []
    for layer in ("blocks.0.attn1.to_q", "blocks.1.attn2.to_k"):
        paths.append(tmp_path / f"{layer.replace('.', '-')}.safetensors")
        weights = peft_lora([layer], {f"{layer}.weight": torch.Size((24, 24))})
        save_file({name: 30 * value for name, value in weights.items()}, paths[-1])
    engine = LoadEngine(chosen(shelf), "cpu", 1, tuple(paths), 0.5)(Stopwatch().trace)
    assert engine.config.loras == (paths[0].stem, paths[1].stem)
    assert engine.config.lora_strength == 0.5

    def drawn(lora: str = "", strength: float = 1.0) -> bytes:
        controls = Controls("a red ball", lora=lora, lora_strength=strength)
        return engine.step(engine.open(7), controls).latents_TCHW.tobytes()

    plain, first, weak, second = drawn(), drawn(paths[0].stem), drawn(paths[0].stem, 0.2), drawn(paths[1].stem)
    assert len({plain, first, weak, second}) == 4
    assert drawn() == plain
    with pytest.raises(PipelineError) as unknown:
        drawn("another")
    assert unknown.value.code == "lora_unknown"
    with pytest.raises(PipelineError) as twice:
        LoadEngine(chosen(shelf), "cpu", 1, (paths[0], paths[0]))(Stopwatch().trace)
    assert twice.value.code == "lora_twice"
    save_file(peft_lora(["blocks.0.attn1.to_q"], {"blocks.0.attn1.to_q.weight": torch.Size((48, 24))}), paths[0])
    with pytest.raises(PipelineError) as wrong:
        LoadEngine(chosen(shelf), "cpu", 1, (paths[0],))(Stopwatch().trace)
    assert wrong.value.code == "lora_mismatch"


def test_each_missing_step_says_what_to_do(shelf: Shelf) -> None:
    assert refusal(shelf).code == "model_not_converted"
    assert "after a pull" in refusal(shelf).remedy
    everything = repos()
    cached(shelf.hub, ROW.repo or "", everything[ROW.repo or ""])
    assert "after a pull" not in refusal(shelf).remedy
    shelves.convert(shelf, ROW, half=False)
    assert refusal(shelf).code == "model_not_pulled"
    cached(shelf.hub, WAN_TEXT.repo or "", everything[WAN_TEXT.repo or ""])
    assert "pull wan-tiny" in refusal(shelf).remedy
    assert chosen(shelf, decoder="full").tiny is None
    cached(shelf.hub, WAN_TINY.repo or "", everything[WAN_TINY.repo or ""])
    assert chosen(shelf).config.width == 64
    assert refusal(shelf, size="70x32").code == "size_invalid"
    assert refusal(shelf, size="big").code == "setting_invalid"
    assert refusal(shelf, decoder="best").code == "setting_invalid"
    assert refusal(shelf, size="40000x40000").code == "memory_short"
    assert refusal(shelf, name="anyflow-far").code == "model_not_served"
    with pytest.raises(AppError) as fixed:
        named(Path("pocket"), "cpu", size="64x32")
    assert fixed.value.code == "setting_invalid"
