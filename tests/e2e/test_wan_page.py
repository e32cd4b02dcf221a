"""A tiny Wan student from its repos on disk to a browser: served, prompted, and told how new words come in."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from app import shelf as shelves
from app.shelf import Shelf
from pipeline.models import BASES
from tests.app.hub import cached
from tests.app.tiny_wan import ROW, repos, shrink_table
from tests.e2e.running import Server, serving
from tests.e2e.viewer import Viewer


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("wan")
    before = BASES["wan-1.3b"]
    shrink_table()
    try:
        shelf = Shelf(folder / "hub", folder / "models")
        for repo, files in repos().items():
            cached(shelf.hub, repo, files)
        shelves.convert(shelf, ROW, half=True)
        for part in shelves.whole(ROW):
            list(shelves.check_pulled(shelf, part))
    finally:
        BASES["wan-1.3b"] = before
    environment = os.environ | {
        "HF_HUB_CACHE": str(shelf.hub),
        "STILLSTREAM_MODELS": str(shelf.models),
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    words = ("serve", "--model", ROW.name, "--size", "64x64", "--accept-licence")
    command = (sys.executable, "-m", "tests.app.tiny_wan", *words)
    with serving(folder / "log.txt", command, environment) as running:
        yield running


@pytest.mark.e2e
def test_a_converted_wan_student_streams_to_a_browser_and_follows_a_new_prompt(open_page) -> None:  # type: ignore[no-untyped-def]
    viewer: Viewer = open_page()
    viewer.ask("a red ball bounces")
    viewer.wait_for_state("live", 120)
    viewer.wait_for_frames()
    viewer.page.select_option("#transition", "recache")
    viewer.ask("a blue ball in the park")
    viewer.wait_for_frames(24)
    assert viewer.trouble == ""
    viewer.leave()
