"""The live path as a person meets it: a real server, a real viewer, each in a process of its own.

`stress` makes the machine busy meanwhile. Knows the server by its command, its HTTP face and its processes only.
"""

import json
import multiprocessing
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import psutil
from prometheus_client.parser import text_string_to_metric_families

from app.bench_figures import Report, bucket_percentile, percentile, spread
from app.bench_viewer import Plan, Seen, watch
from app.errors import AppError
from app.worker import usable_cores

LOAD_S = 120.0
END_S = 15.0
SAMPLE_S = 1.0
MB = 1e6
LAG = "stillstream_loop_lag_ms"

Buckets = list[tuple[float, float]]  # upper edge, observations up to it


@dataclass(frozen=True)
class Memory:
    """Resident, in MB. all: every process of the server; pages that two of them share count twice."""

    server_mb: float
    worker_mb: float
    all_mb: float


@dataclass(frozen=True)
class Server:
    """A running `stillstream serve`, warm."""

    url: str
    process: psutil.Process

    def memory(self) -> Memory:
        server_mb = self.process.memory_info().rss / MB
        children = self.process.children(recursive=True)
        children_mb = [(child, child.memory_info().rss / MB) for child in children]
        worker_mb = max((mb for child, mb in children_mb if "spawn_main" in " ".join(child.cmdline())), default=0.0)
        return Memory(server_mb, worker_mb, server_mb + sum(mb for _, mb in children_mb))

    def lag_buckets(self) -> Buckets:
        """All that the event loop's lag ever was."""
        families = text_string_to_metric_families(_get(f"{self.url}/metrics"))
        samples = [sample for family in families for sample in family.samples if sample.name == f"{LAG}_bucket"]
        return [(float(sample.labels["le"]), sample.value) for sample in samples]


@contextmanager
def serving(model: Path | None, threads: int) -> Iterator[Server]:
    """A warm server on a free port, for one viewer. Raises AppError (`server_ended`, `server_slow`)."""
    options = ["--port", "0", "--host", "127.0.0.1", "--workers", "1", "--threads", str(threads)]
    options += ["--device", "cpu", "--log-level", "warning", *(["--model", str(model)] if model else [])]
    command = [sys.executable, "-u", "-m", "app", "serve", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"http://\S+", process.stdout.readline())
            if found is None:
                raise AppError("server_ended", "The server ended before it was there.", "Run `stillstream serve`.")
            server = Server(found.group(), psutil.Process(process.pid))
            _wait_until_warm(server, process)
            yield server
        finally:
            process.terminate()
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait_until_warm(server: Server, process: "subprocess.Popen[str]") -> None:
    deadline_s = time.monotonic() + LOAD_S
    while time.monotonic() < deadline_s:
        if process.poll() is not None:
            raise AppError("server_ended", "The server ended while it loaded.", "Run `stillstream serve`.")
        try:
            if json.loads(_get(f"{server.url}/api/health"))["status"] == "ready":
                return
        except OSError:
            pass  # 503 while it loads
        time.sleep(0.2)
    raise AppError("server_slow", f"The server was not ready within {LOAD_S:g} s.", "Run the doctor.")


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return str(answer.read().decode())


@contextmanager
def stress(processes: int) -> Iterator[None]:
    """Keep so many cores busy, at everyday priority."""
    context = multiprocessing.get_context("spawn")
    spinners = [context.Process(target=_spin, daemon=True) for _ in range(processes)]
    for spinner in spinners:
        spinner.start()
    try:
        yield
    finally:
        for spinner in spinners:
            spinner.terminate()
            spinner.join()


def _spin() -> None:
    while True:
        pass


@dataclass
class Watched:
    """What the viewer saw, and what the server was meanwhile."""

    seen: Seen
    memory: list[Memory] = field(default_factory=list)
    lag: Buckets = field(default_factory=list)


def follow(server: Server, plan: Plan, sample_s: float = SAMPLE_S) -> Watched:
    """Send a viewer, and watch the server until it is back."""
    before = server.lag_buckets()
    memory: list[Memory] = []
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        viewer: Future[Seen] = pool.submit(watch, server.url, plan)
        try:
            while not viewer.done():
                with suppress(psutil.NoSuchProcess):  # the viewer knows better what happened
                    memory.append(server.memory())
                time.sleep(sample_s)
        except BaseException:
            # The pool would wait for the whole plan before it lets anyone end.
            for process in multiprocessing.active_children():
                process.terminate()
            raise
        seen = viewer.result()
    after = server.lag_buckets()
    lag = [(edge, count - earlier) for (edge, count), (_, earlier) in zip(after, before, strict=True)]
    return Watched(seen, memory, lag)


def measure_live(model: Path | None, threads: int, plan: Plan, *, loaded: bool) -> Report:
    """A fresh server for each call: start-up is not measured, nor done under load."""
    with serving(model, threads) as server, stress(usable_cores() if loaded else 0):
        info = json.loads(_get(f"{server.url}/api/info"))["model"]
        return summarise(follow(server, plan), chunk_s=info["frames_per_chunk"] / info["fps"])


def summarise(watched: Watched, chunk_s: float) -> Report:
    seen, memory = watched.seen, watched.memory
    seen_s = [sight.seen_s for sight in seen.sights]
    gaps_ms = [float(gap) * 1000 for gap in np.diff(seen_s)]
    chunk_ms = [float(said["chunk_ms"]) for said in seen.stats]
    stood_out_ms = [change.change_ms for change in seen.changes if change.change_ms is not None]
    return {
        "fps_viewer": 1000 / fmean(gaps_ms) if gaps_ms else None,
        "frame_gap_ms_p99": percentile(gaps_ms, 99),
        "frame_gap_ms_max": max(gaps_ms, default=None),
        "generation_share": fmean(chunk_ms) / 1000 / chunk_s if chunk_ms else None,
        **spread("chunk_ms", chunk_ms),
        **spread("first_frame_ms", seen.first_frame_ms),
        **spread("prompt_to_picture_ms", [change.picture_ms for change in seen.changes]),
        **spread("prompt_to_change_ms", stood_out_ms),
        "prompt_changes": len(seen.changes),
        "prompt_changes_seen": len(stood_out_ms),
        "server_latency_ms_p95": percentile([change.server_ms for change in seen.changes], 95),
        "loop_lag_ms_p99": bucket_percentile(watched.lag, 99),
        "dropped_frames": _rise(seen.stats, "dropped_frames"),
        "queue_frames_max": max((int(said["queue_frames"]) for said in seen.stats), default=None),
        "rss_server_mb": max((each.server_mb for each in memory), default=None),
        "rss_worker_mb": max((each.worker_mb for each in memory), default=None),
        "rss_mb": max((each.all_mb for each in memory), default=None),
    }


def _rise(stats: list[dict[str, Any]], name: str) -> int | None:
    return int(stats[-1][name]) - int(stats[0][name]) if stats else None
