"""Figures of a running server in Prometheus' format, on a registry of its own. Knows no session."""

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CHUNK_MS = (50, 100, 150, 200, 250, 300, 350, 400, 500, 750, 1000, 2000, 5000)
STAGE_MS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
LAG_MS = (1, 2, 5, 10, 20, 50, 100, 200, 500)


class Metrics:
    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self.sessions = Gauge("stillstream_sessions", "Open sessions", registry=registry)
        self.chunks = Counter("stillstream_chunks", "Chunks made", registry=registry)
        self.chunk_ms = Histogram("stillstream_chunk_ms", "Time to make a chunk", buckets=CHUNK_MS, registry=registry)
        self.stage_ms = Histogram(
            "stillstream_stage_ms", "Time of a stage of a chunk", ["stage"], buckets=STAGE_MS, registry=registry
        )
        self.frames_shown = Counter("stillstream_frames_shown", "Frames that left to viewers", registry=registry)
        self.frames_dropped = Counter("stillstream_frames_dropped", "Frames made but not shown", registry=registry)
        self.camera_frames = Counter("stillstream_camera_frames", "Camera frames received", registry=registry)
        self.worker_restarts = Counter("stillstream_worker_restarts", "Workers started again", registry=registry)
        self.loop_lag_ms = Histogram(
            "stillstream_loop_lag_ms", "Lateness of the event loop", buckets=LAG_MS, registry=registry
        )

    def took(self, chunk_ms: float, stages_ms: Mapping[str, float]) -> None:
        """One chunk was made."""
        self.chunks.inc()
        self.chunk_ms.observe(chunk_ms)
        for stage, spent_ms in stages_ms.items():
            self.stage_ms.labels(stage).observe(spent_ms)

    def text(self) -> bytes:
        return generate_latest(self._registry)
