"""What a model makes of the example prompts: a contact sheet, one row a prompt, time from left to right, and a film."""

from pathlib import Path

import numpy as np

from pipeline.chunk import Controls
from pipeline.codec import PocketCodec
from pipeline.config import ModelConfig
from pipeline.engine import Engine
from pipeline.student import Student
from pipeline.text import TextEncoder
from pipeline.training.sheet import write_film, write_sheet

CHUNKS = 6


def look(config: ModelConfig, codec: PocketCodec, text: TextEncoder, student: Student, folder: Path) -> Path:
    """Write `look.png` and `look.webp` to the folder; returns the sheet's path."""
    engine = Engine(config, codec, text, student)
    clips = []
    for seed, prompt in enumerate(config.examples):
        state = engine.open(seed)
        chunks = [engine.step(state, Controls(prompt, seed)).frames_THWC for _ in range(CHUNKS)]
        clips.append(np.concatenate(chunks))
    last = config.frames_per_chunk - 1
    write_sheet(folder / "look.png", [list(clip[last :: config.frames_per_chunk]) for clip in clips])
    write_film(folder / "look.webp", [clip[:, ::2, ::2] for clip in clips], config.fps)
    return folder / "look.png"
