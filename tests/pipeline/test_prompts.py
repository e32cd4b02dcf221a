"""Prompts are read once, off the stream's path, and kept in memory and on disk."""

import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.prompts import Prompts


class Reader:
    """Reads as slowly as a test wants; remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, prompt: str) -> Tensor:
        self.asked.append(prompt)
        assert self.gate.wait(30)
        if prompt == "broken":
            raise ValueError("no")
        return torch.full((len(prompt), 3), float(len(prompt)), dtype=torch.bfloat16)


def test_an_embedding_is_padded_with_zeros_and_read_once() -> None:
    reader = Reader()
    prompts = Prompts(reader, 6)
    made = prompts.embed("red")
    assert made.shape == (1, 6, 3)
    assert made[0, :3].eq(3).all() and made[0, 3:].eq(0).all()
    assert torch.equal(prompts.embed("red"), made)
    assert reader.asked == ["red"]
    assert prompts.unknown("wug") == []


def test_whoever_asks_does_not_wait_and_the_newest_prompt_is_next() -> None:
    reader = Reader()
    prompts = Prompts(reader, 9)
    reader.gate.clear()
    assert prompts.ask("one") is None
    assert prompts.ask("second") is None
    assert prompts.ask("third") is None
    reader.gate.set()
    assert prompts.embed("third")[0, 0, 0] == 5
    found = prompts.ask("third")
    assert found is not None and found[0, 0, 0] == 5
    assert "second" not in reader.asked


def test_what_was_read_is_kept_on_disk_by_encoder_and_prompt(tmp_path: Path) -> None:
    Prompts(Reader(), 6, key="a" * 64, folder=tmp_path).embed("red")
    again, other = Reader(), Reader()
    assert Prompts(again, 6, key="a" * 64, folder=tmp_path).embed("red")[0, 0, 0] == 3
    assert again.asked == []
    Prompts(other, 6, key="b" * 64, folder=tmp_path).embed("red")
    assert other.asked == ["red"]
    for path in tmp_path.rglob("*.safetensors"):
        path.write_bytes(b"torn")
    Prompts(again, 6, key="a" * 64, folder=tmp_path).embed("red")
    assert again.asked == ["red"]
    assert not list(tmp_path.rglob("*.part"))


def test_a_folder_that_cannot_be_written_costs_only_the_keeping(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert Prompts(Reader(), 6, folder=tmp_path / "file").embed("red").shape == (1, 6, 3)


def test_an_error_of_the_reader_reaches_who_asks_and_is_not_kept() -> None:
    reader = Reader()
    prompts = Prompts(reader, 6)
    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            prompts.embed("broken")
    assert reader.asked == ["broken", "broken"]
