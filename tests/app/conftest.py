from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.app.scene import Scene, scene
from tests.app.tiny import write_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_model(folder)
    return folder


@pytest.fixture
async def live() -> AsyncIterator[Scene]:
    async with scene() as made:
        await made.go_live()
        yield made
