"""The benchmark of Wan students runs as its command does, small and on a CPU. What it says of time is not looked at."""

import json
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from benchmarks import wan

FIGURES = ("denoise_ms", "decode_ms", "convert_ms", "encode_ms", "chunk_ms", "memory_bytes", "growth_bytes")
SMALL = ("--device", "cpu", "--tiny", "--width", "64", "--height", "32", "--chunks", "4")


def run(*words: str) -> Result:
    command = typer.Typer()
    command.command()(wan.main)
    return CliRunner().invoke(command, [*SMALL, *words])


def rows(result: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]


def test_each_stage_and_share_of_tiles_of_a_family_is_a_figure_and_a_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wan, "FEW", 2)
    result = run("--family", "streamdiffusion-v2", "--regions")
    assert result.exit_code == 0, result.exception
    (row,) = rows(result)
    assert [name for name in FIGURES if row[name] is None] == []
    assert [row[f"tiles_{share}_ms"] > 0 for share in (10, 20, 30)] == [True] * 3
    assert (row["cache_ms"], row["reckoned_bytes"], row["trouble"]) == (None, None, None)
    assert (row["chunks"], row["settled_chunks"], row["frames_per_chunk"]) == (4, 2, 4)
    head, _, cells = (line.split(" | ") for line in result.stdout.splitlines() if line.startswith("|"))
    assert len(head) == len(cells) == 15
    assert cells[:3:2] == ["| `streamdiffusion-v2`", "none of its own"]


def test_a_family_that_refuses_regions_has_all_other_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wan, "FEW", 2)
    result = run("--family", "anyflow-far", "--regions")
    assert result.exit_code == 0, result.exception
    (row,) = rows(result)
    assert [name for name in (*FIGURES, "cache_ms") if row[name] is None] == []
    assert not row["regions"] and row["trouble"] is None
    assert result.stdout.count("| refused ") == 3


def test_a_model_that_does_not_fit_says_so_and_the_next_one_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(run: wan.Run, config: Any, **_: Any) -> None:
        run.spent_ms["chunk"] += [20.0, 10.0, 12.0]
        if config.name == "krea-realtime":
            raise MemoryError

    monkeypatch.setattr(wan, "measure", measure)
    result = run("--family", "krea-realtime", "--family", "longlive")
    assert result.exit_code == 0, result.exception
    first, second = rows(result)
    assert first["trouble"] == "Memory ran out." and second["trouble"] is None
    assert first["chunk_ms"] == second["chunk_ms"] == 12
    assert "`krea-realtime`: Memory ran out." in result.stdout
    assert result.stdout.count("not measured") > 10


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("--device", "cuda:99"), "device_unusable"),
        (("--width", "70"), "size_invalid"),
        (("--family", "sora"), "model_unknown"),
        (("--family", "pocket"), "model_not_served"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(words: tuple[str, ...], code: str) -> None:
    result = run(*words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"{code}: ") and len(result.stderr.splitlines()) == 1
