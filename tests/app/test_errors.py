"""Memory that ran out is told apart from faults of ours, with the numbers that torch gives."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from app.errors import memory_short
from tests.app.fakes import CUDA_FULL

ROOT = Path(__file__).parents[2]


def test_what_torch_says_of_a_full_gpu_keeps_its_numbers() -> None:
    told = memory_short(torch.OutOfMemoryError(CUDA_FULL))
    assert told is not None and told.code == "memory_short"
    assert told.message == (
        "Memory ran out: 1.50 GiB more were asked for, 12.62 MiB of 79.11 GiB are free, this process uses 70.94 GiB."
    )


def test_a_full_machine_is_told_too() -> None:
    with pytest.raises(RuntimeError) as full:
        torch.empty(2**55)
    told = memory_short(full.value)
    assert told is not None and f"{2**57} bytes more" in told.message
    plain = memory_short(MemoryError())
    assert plain is not None and plain.message == "Memory ran out."


def test_other_faults_stay_what_they_are() -> None:
    assert memory_short(RuntimeError("CUDA error: invalid device ordinal")) is None
    assert memory_short(ValueError("out of range")) is None


def test_the_command_line_says_it_in_one_line(tmp_path: Path) -> None:
    script = (
        "import sys, app.generate, app.cli\n"
        "from tests.app.fakes import load_too_much\n"
        "app.cli.LoadEngine = lambda *words, **named: load_too_much\n"
        f"sys.argv = ['stillstream', 'generate', '--prompt', 'a red ball', '--out', {str(tmp_path / 'clip.mp4')!r}]\n"
        "app.cli.main()\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert ended.returncode == 2
    assert ended.stderr.strip().splitlines()[-1].startswith("memory_short: Memory ran out: 1.50 GiB more")
    assert "Traceback" not in ended.stderr
    assert list(tmp_path.iterdir()) == []
