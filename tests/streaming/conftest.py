import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest
from aiortc.codecs import h264, vpx
from hypothesis import HealthCheck, settings

from streaming.rates import tune_encoders
from tests.streaming.viewer import FPS, HEIGHT, WIDTH, until

# A busy machine is slow; that is no failure of what is tested.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


@pytest.fixture
def tuned() -> Iterator[None]:
    names = ("DEFAULT_BITRATE", "MIN_BITRATE", "MAX_BITRATE", "MAX_FRAME_RATE")
    before = [(codec, name, getattr(codec, name)) for codec in (h264, vpx) for name in names]
    tune_encoders(FPS, WIDTH, HEIGHT)
    yield
    for codec, name, value in before:
        setattr(codec, name, value)


@pytest.fixture
async def no_task_left() -> AsyncIterator[None]:
    yield
    # A callback of a finished task may still be on its way.
    await until(lambda: asyncio.all_tasks() == {asyncio.current_task()})
