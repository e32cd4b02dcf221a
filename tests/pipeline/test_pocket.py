"""The embedded model is whole, small, and makes pictures."""

import numpy as np
import pytest

from pipeline.chunk import Controls
from pipeline.engine import Engine
from pipeline.text import TextEncoder
from pipeline.weights import pocket_folder, verify


@pytest.fixture(scope="module")
def pocket() -> Engine:
    return Engine.load()


def test_the_embedded_model_matches_its_checksums() -> None:
    verify(pocket_folder())


def test_the_embedded_model_takes_at_most_forty_megabytes() -> None:
    assert sum(path.stat().st_size for path in pocket_folder().iterdir() if path.is_file()) <= 40e6


def test_the_embedded_model_has_the_promised_shape(pocket: Engine) -> None:
    config = pocket.config
    assert config.width >= 256
    assert config.width > config.height
    assert config.fps == 16
    assert 60 <= config.tokens_per_frame <= 240
    assert config.width % (config.codec.spatial_stride * config.student.patch_size[2]) == 0
    assert config.height % (config.codec.spatial_stride * config.student.patch_size[1]) == 0


def test_the_embedded_model_knows_every_word_of_its_examples(pocket: Engine) -> None:
    assert isinstance(pocket.text, TextEncoder)
    assert pocket.config.examples
    for prompt in pocket.config.examples:
        assert pocket.text.unknown(prompt) == []
        assert len(prompt) <= pocket.config.prompt_limit


def test_the_embedded_model_makes_pictures_that_are_not_flat(pocket: Engine) -> None:
    config, state = pocket.config, pocket.open(7)
    controls = Controls("a red ball moves right on the beach")
    chunks = [pocket.step(state, controls) for _ in range(2)]
    for chunk in chunks:
        assert chunk.frames_THWC.shape == (config.frames_per_chunk, config.height, config.width, 3)
        assert np.isfinite(chunk.latents_TCHW).all()
        assert np.abs(chunk.latents_TCHW).max() < 20
        for frame in chunk.frames_THWC:
            assert frame.astype(float).std() > 10


def test_the_embedded_model_paints_the_place_that_the_prompt_names(pocket: Engine) -> None:
    """Mean colours: sand is warmer than the sea, snow is brighter than a city at night."""

    def mean_rgb(prompt: str) -> np.ndarray:
        state = pocket.open(7)
        chunks = [pocket.step(state, Controls(prompt)) for _ in range(2)]
        return np.asarray(chunks[-1].frames_THWC.mean((0, 1, 2)))

    desert, sea = mean_rgb("a red ball rests in the desert"), mean_rgb("a red ball rests under water")
    assert desert[0] - desert[2] > 20
    assert sea[2] - sea[0] > 20
    assert (
        mean_rgb("a red ball rests in the snow").mean() > mean_rgb("a red ball rests in the city at night").mean() + 40
    )
