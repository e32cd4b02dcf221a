"""The worker with a real spawned process and a fake engine."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from math import inf
from pathlib import Path

import psutil
import pytest

from app import worker_client
from app.errors import AppError, WorkerLostError
from app.mailbox import Order
from app.worker import default_threads, quota_cores
from app.worker_client import Health, WorkerClient
from pipeline.chunk import Controls
from pipeline.errors import PipelineError
from tests.app.fakes import LoadWhile, load_damaged, load_fake, load_pid_environment, load_too_much

RED = Order(Controls("a red ball"), fresh=True)


@pytest.fixture
async def worker() -> AsyncIterator[WorkerClient]:
    client = WorkerClient(load_fake, threads=1)
    await client.start()
    yield client
    await client.stop()


async def test_a_started_worker_tells_its_model_and_makes_chunks_in_order(worker: WorkerClient) -> None:
    first = await worker.step(RED)
    second = await worker.step(Order(Controls("a green ball", epoch=3)))

    assert worker.health is Health.READY
    assert (first.chunk.index, second.chunk.index) == (0, 1)
    assert second.chunk.epoch == 3
    assert first.chunk.frames_THWC[0, 0, 40].tolist() == [200, 0, 0]
    assert set(first.stages_ms) == {"text", "decode"}
    assert first.chunk_ms >= first.stages_ms["decode"] > 0


async def test_each_word_that_the_model_does_not_know_is_told_once(worker: WorkerClient) -> None:
    made = await worker.step(Order(Controls("a red dragon and a blue dragon")))

    assert made.unknown_words == ("dragon",)


async def test_a_fresh_order_starts_the_stream_again(worker: WorkerClient) -> None:
    first = await worker.step(RED)
    await worker.step(Order(RED.controls))
    again = await worker.step(RED)

    assert again.chunk.index == 0
    assert (again.chunk.frames_THWC == first.chunk.frames_THWC).all()


async def test_a_refused_prompt_is_an_answer_and_the_worker_lives_on(worker: WorkerClient) -> None:
    with pytest.raises(PipelineError) as refusal:
        await worker.step(Order(Controls("refuse")))

    assert refusal.value.code == "prompt_refused"
    assert (await worker.step(RED)).chunk.index == 0
    assert worker.restarts == 0


@pytest.mark.parametrize("prompt", ["crash", "die"])
async def test_a_worker_that_fails_or_is_killed_mid_chunk_is_started_again(worker: WorkerClient, prompt: str) -> None:
    old_pid = worker.pid
    with pytest.raises(WorkerLostError):
        await worker.step(Order(Controls(prompt)))
    await _recovered(worker)

    assert worker.pid != old_pid
    assert (await worker.step(RED)).chunk.index == 0


async def test_a_worker_that_hangs_mid_chunk_is_given_up(worker: WorkerClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_client, "CHUNK_LIMIT_S", 0.5)
    with pytest.raises(WorkerLostError, match=r"more than 0\.5 s"):
        await worker.step(Order(Controls("hang")))
    monkeypatch.undo()
    await _recovered(worker)

    assert (await worker.step(RED)).chunk.index == 0


async def test_a_worker_killed_while_idle_is_started_again(worker: WorkerClient) -> None:
    os.kill(worker.pid or 0, signal.SIGKILL)
    await _recovered(worker)

    assert (await worker.step(RED)).chunk.index == 0


async def test_a_worker_that_fails_to_start_again_and_again_is_told_and_still_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_client, "LONGEST_PAUSE_S", 0.01)
    monkeypatch.setattr(worker_client, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(worker_client, "LOAD_TRIES", 2)
    there = tmp_path / "weights"
    there.touch()
    client = WorkerClient(LoadWhile(there), threads=1)
    await client.start()
    try:
        there.unlink()
        os.kill(client.pid or 0, signal.SIGKILL)
        async with asyncio.timeout(60):
            await client.lost()
            with pytest.raises(AppError) as told:
                await client.ready()
            assert told.value.code == "worker_failed"
            there.touch()
            while True:
                try:
                    await client.ready()
                    break
                except AppError:
                    await asyncio.sleep(0.05)
        assert (await client.step(RED)).chunk.index == 0
    finally:
        await client.stop()


async def test_ctrl_c_does_not_reach_the_worker(worker: WorkerClient) -> None:
    os.kill(worker.pid or 0, signal.SIGINT)

    assert (await worker.step(RED)).chunk.index == 0


async def test_stop_joins_the_process() -> None:
    client = WorkerClient(load_fake, threads=1)
    await client.start()
    pid = client.pid
    await client.stop()

    assert client.health is Health.STOPPED
    assert not psutil.pid_exists(pid or 0)


async def test_damaged_weights_are_told_to_whoever_starts_the_worker() -> None:
    client = WorkerClient(load_damaged, threads=1)
    with pytest.raises(PipelineError) as damage:
        await client.start()
    await client.stop()

    assert damage.value.code == "weights_damaged"


async def test_memory_that_runs_out_is_told_with_its_numbers_at_the_start_and_in_a_stream() -> None:
    client = WorkerClient(load_too_much, threads=1)
    with pytest.raises(AppError) as full:
        await client.start()
    await client.stop()
    assert full.value.code == "memory_short"
    assert all(number in full.value.message for number in ("1.50 GiB", "12.62 MiB", "79.11 GiB", "70.94 GiB"))
    assert "\n" not in full.value.message and "8 bits" in full.value.remedy

    client = WorkerClient(load_fake, threads=1)
    await client.start()
    try:
        with pytest.raises(WorkerLostError) as lost:
            await client.step(Order(Controls("memory")))
        assert lost.value.told is not None and lost.value.told.code == "memory_short"
        await _recovered(client)
        with pytest.raises(WorkerLostError) as lost:
            await client.step(Order(Controls("crash")))
        assert lost.value.told is None
    finally:
        await client.stop()


async def test_the_wait_policy_is_settled_before_torch_is_imported() -> None:
    client = WorkerClient(load_pid_environment, threads=2)
    with pytest.raises(PipelineError) as told:
        await client.start()
    await client.stop()

    assert told.value.message == "2,PASSIVE,0,0,False"


def test_no_more_threads_than_cores_and_never_more_than_four() -> None:
    assert 1 <= default_threads() <= min(4, len(os.sched_getaffinity(0)))


@pytest.mark.parametrize(("text", "cores"), [("150000 100000\n", 1.5), ("max 100000\n", inf), (None, inf)])
def test_a_containers_share_of_the_cores_is_read(tmp_path: Path, text: str | None, cores: float) -> None:
    path = tmp_path / "cpu.max"
    if text is not None:
        path.write_text(text)

    assert quota_cores(path) == cores


def test_the_worker_ends_with_its_parent(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import asyncio, sys\n"
        "from app.worker_client import WorkerClient\n"
        "from tests.app.fakes import load_fake\n"
        "async def main():\n"
        "    client = WorkerClient(load_fake, threads=1)\n"
        "    await client.start()\n"
        "    print(client.pid, flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "if __name__ == '__main__':\n"
        "    asyncio.run(main())\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        worker = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
        gone, _ = psutil.wait_procs([worker], timeout=60)

    assert gone


async def _recovered(worker: WorkerClient) -> None:
    async with asyncio.timeout(60):
        await worker.lost()
        await worker.ready()
