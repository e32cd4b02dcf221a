"""Every row of the table can be run by what we have, and says where it was read."""

import re
from pathlib import Path
from urllib.parse import urlparse

import pytest
import torch
from torch import Tensor

from pipeline.bases import BASES
from pipeline.config import StudentConfig, load_config
from pipeline.errors import PipelineError
from pipeline.family import Family
from pipeline.models import FAMILIES, family
from pipeline.sampler import denoise, levels
from pipeline.weights import pocket_folder

WAN = [row for row in FAMILIES if row.layout == "wan" and not row.coarse]
"""Those that have Wan's modules alone; tests/pipeline/test_anyflow.py has the others."""


@pytest.mark.parametrize("row", FAMILIES, ids=lambda row: row.name)
def test_a_row_is_whole_and_runs_on_our_cache_and_sampler(row: Family) -> None:
    assert family(row.name) is row
    assert row.base in BASES
    assert 1 <= row.chunk <= 3
    assert row.cache.window >= row.chunk - 1 >= 0
    assert row.cache.sink + row.cache.coarse + row.cache.window + row.chunk == row.attends
    sigmas = levels(row.sampler)
    assert sigmas == sorted(sigmas, reverse=True)
    assert all(0 < sigma <= 1 for sigma in sigmas)
    assert {field.split(".")[0] for field in row.unverified} <= set(Family.__dataclass_fields__)


@pytest.mark.parametrize("row", [row for row in FAMILIES if row.repo], ids=lambda row: row.name)
def test_a_row_of_the_hub_names_its_files_and_its_source(row: Family) -> None:
    assert row.repo is not None and row.repo.count("/") == 1
    assert row.files
    assert urlparse(row.source).netloc
    assert (row.lora is None) == (row.lora_weights is None)
    assert row.lora is None or row.wants(row.lora)


def test_names_are_unique() -> None:
    assert len({row.name for row in FAMILIES}) == len(FAMILIES)


def test_the_pocket_row_is_what_the_embedded_model_says_of_itself() -> None:
    row, config = family("pocket"), load_config(pocket_folder() / "config.json")
    assert row.shape == config.student
    assert row.chunk == config.chunk
    assert row.cache == config.cache
    assert (row.sampler.steps, row.sampler.shift) == (config.sampler.steps, config.sampler.shift)


# By hand, from each row's own configuration: positions 1000, 750, 500, 250, which a shift of 5 moves to
# 5p / (1 + 4p), as 3.75 / 4 and 2.5 / 3; StreamDiffusionV2 takes 700, 500, 400, 200 as they stand.
FOUR = (1000, 937.5, 833.333333, 625)
TIMESTEPS = {
    "self-forcing": (FOUR, FOUR),
    "causal-forcing": (FOUR, FOUR),
    "causal-forcing-frame": (FOUR, FOUR),
    "causal-forcing-2step": (FOUR, (1000, 833.333333)),
    "causal-forcing-1step": (FOUR, (1000,)),
    "longlive": (FOUR, FOUR),
    "reward-forcing": (FOUR, FOUR),
    "krea-realtime": (FOUR, FOUR),
    "streamdiffusion-v2": ((700, 500, 400, 200), (700, 500, 400, 200)),
    "streamdiffusion-v2-14b": ((700, 500, 400, 200), (700, 500, 400, 200)),
}
"""Of a stream's first chunk, and of any other."""

# What each pass is given where the passes' noise is 1, -1, 2 and 0.5, the student says a flow of 1 each time, and a
# video to draw over is 0.4 throughout; and what comes out at the end. noisy = (1 - sigma) clean + sigma noise, and
# clean = noisy - sigma: of four passes from pure noise 1 -> 0, -0.9375 -> -1.875, -1.875 / 6 + 2 / 1.2 -> ...
NOISE, OVER = (1.0, -1.0, 2.0, 0.5), 0.4
RENOISED = {
    FOUR: ((1, -0.9375, 1.354166667, 0.5078125), -0.1171875),
    (1000, 833.333333): ((1, -0.833333333), -1.666666667),
    (1000,): ((1,), 0),
    (700, 500, 400, 200): ((0.82, -0.44, 0.236, -0.0312), -0.2312),
}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("row", WAN, ids=lambda row: row.name)
def test_a_rows_timesteps_and_what_is_noised_again_between_them_are_those_written_out(row: Family, first: bool) -> None:
    timesteps = TIMESTEPS[row.name][0 if first else 1]
    told: list[float] = []
    given: list[float] = []

    def student(noisy: Tensor, sigma: float, step: int) -> Tensor:
        told.append(1000 * sigma)
        given.append(noisy.item())
        return torch.ones(1, dtype=torch.float64)

    source = None if timesteps[0] == 1000 else torch.full((1,), OVER, dtype=torch.float64)
    sigmas = levels(row.sampler, first=first)
    clean = denoise(student, lambda step: torch.full((1,), NOISE[step], dtype=torch.float64), sigmas, source)
    noisy, end = RENOISED[timesteps]
    assert told == pytest.approx(timesteps)
    assert given == pytest.approx(noisy)
    assert clean.item() == pytest.approx(end)


def test_the_sink_of_reward_forcing_moves_and_no_other_does() -> None:
    assert [(row.name, row.cache.sink_keeps) for row in FAMILIES if row.cache.sink_keeps != 1] == [
        ("reward-forcing", 0.999)
    ]


def test_a_file_of_the_repo_that_is_not_the_rows_is_not_wanted() -> None:
    row = family("causal-forcing")
    assert row.wants("chunkwise/causal_forcing.pt")
    assert not row.wants("framewise/causal_forcing.pt")
    assert family("anyflow-far").wants("transformer/config.json")


def test_use_that_no_source_allows_needs_consent() -> None:
    assert not family("self-forcing").needs_consent
    assert family("krea-realtime").needs_consent
    assert family("reward-forcing").needs_consent


def test_the_wan_families_have_wans_two_shapes() -> None:
    small, large = StudentConfig(), StudentConfig()
    for row in WAN:
        small, large = (row.shape, large) if row.base == "wan-1.3b" else (small, row.shape)
        assert (row.shape.in_channels, row.shape.text_dim, row.shape.attention_head_dim) == (16, 4096, 128)
    assert (small.num_layers, large.num_layers) == (30, 40)


def test_a_name_that_is_not_in_the_table_is_answered_with_those_that_are() -> None:
    with pytest.raises(PipelineError) as refused:
        family("sora")
    assert refused.value.code == "model_unknown"
    assert "self-forcing" in refused.value.remedy


def test_the_page_of_models_has_the_rows_as_the_table_has_them() -> None:
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    told = [line for line in page.splitlines() if re.match(r"\| `[\w-]+` \|", line) and line.count("|") == 9]
    known = []
    for row in FAMILIES:
        first = f", first chunk {len(row.first_steps)}" if row.first_steps else ""
        steps = "any" if row.any_steps else f"{len(row.steps)}{first}"
        use = {True: "yes", False: "no", None: "not stated"}[row.commercial]
        chunk = f"{row.chunk}, the first {row.first_chunk}" if row.first_chunk else str(row.chunk)
        unread = ", ".join(row.unverified)
        cells = (f"`{row.name}`", row.repo or "embedded", steps, chunk, row.past, row.licence, use, unread)
        known.append("| " + " | ".join(cells) + " |")
    assert [line.replace("|  |", "| |") for line in known] == told
