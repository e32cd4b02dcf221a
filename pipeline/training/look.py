"""A contact sheet of what a model makes of the example prompts: one row a prompt, time from left to right."""

from pathlib import Path

from pipeline.chunk import Controls
from pipeline.codec import PocketCodec
from pipeline.config import ModelConfig
from pipeline.engine import Engine
from pipeline.student import Student
from pipeline.text import TextEncoder
from pipeline.training.sheet import write_sheet

CHUNKS = 6


def look(config: ModelConfig, codec: PocketCodec, text: TextEncoder, student: Student, path: Path) -> None:
    engine = Engine(config, codec, text, student)
    rows = []
    for seed, prompt in enumerate(config.examples):
        state = engine.open(seed)
        chunks = [engine.step(state, Controls(prompt, seed)) for _ in range(CHUNKS)]
        rows.append([frame for chunk in chunks for frame in chunk.frames_THWC[:: config.frames_per_chunk // 2]][:6])
    write_sheet(path, rows)
