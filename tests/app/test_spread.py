"""Work is done for every item, in order, on several threads, and all of it ends when one fails."""

import time
from threading import Event, get_ident

import pytest
import torch
from rich.console import Console
from rich.progress import Progress

from app.spread import Spreader


@pytest.fixture
def progress() -> Progress:
    return Progress(console=Console(quiet=True))


def test_what_comes_of_each_item_stands_in_its_order_and_every_chunk_is_counted(progress: Progress) -> None:
    def work(item: int, made: object) -> int:
        time.sleep(0.01 * (3 - item))
        made()  # type: ignore[operator]
        return 10 * item

    assert Spreader(progress, 2)(work, [0, 1, 2], 3, "clips") == [0, 10, 20]
    assert [(task.completed, task.total, task.description) for task in progress.tasks] == [(3, 3, "clips")]


def test_items_share_the_threads_and_a_single_one_has_them_all(progress: Progress) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        spread, both = Spreader(progress, 2), Event()

        def work(item: int, made: object) -> tuple[int, int]:
            if item:
                both.set()
            else:
                assert both.wait(10), "the other item waits for this one"
            return torch.get_num_threads(), get_ident()

        found = spread(work, [0, 1], 2, "two")
        assert [threads for threads, _ in found] == [1, 1]
        assert spread(work, [1], 1, "one") == [(2, get_ident())]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_when_one_fails_the_others_end_at_their_next_chunk(progress: Progress) -> None:
    begun = Event()

    def work(item: int, made: object) -> None:
        if item == 0:
            assert begun.wait(10)
            raise ValueError("this one")
        while True:
            begun.set()
            time.sleep(0.001)
            made()  # type: ignore[operator]

    with pytest.raises(ValueError, match="this one"):
        Spreader(progress, 2)(work, [0, 1, 2], 9, "clips")
