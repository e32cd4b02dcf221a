"""Step caching at 50, 8 and 4 passes: time saved, and likeness to the uncached stream with the same noise.

    .venv/bin/python benchmarks/step_cache.py --teacher runs/pocket/teacher

Guided passes follow one noise from step to step; without a teacher the student's weights make them, unguided. A student
draws fresh noise for each pass. Every chunk starts from a copy of the uncached stream's state.
"""

from copy import deepcopy
from pathlib import Path
from time import process_time
from typing import Annotated

import numpy as np
import typer

from app.region_figures import psnr, ssim
from app.worker import calm_openmp

PROMPT = "an orange robot sways on a stage in front of an audience"
THRESHOLDS = (0.05, 0.1, 0.2, 0.4)


def main(
    teacher: Annotated[Path | None, typer.Option(help="The teacher's folder, of the run that made the model.")] = None,
    model: Annotated[Path | None, typer.Option(help="A model folder; by default the pocket student.")] = None,
    chunks: Annotated[int, typer.Option(min=1)] = 4,
) -> None:
    calm_openmp(1)
    from pipeline.chunk import Controls
    from pipeline.engine import Engine
    from pipeline.sampler import with_steps
    from pipeline.training.guided import GuidedTeacher, load_teacher

    student = Engine.load(model, threads=1)
    parts = (student.codec, student.text, student.student)
    print("| passes | threshold | dense / cached processor time | psnr | ssim |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    led = load_teacher(teacher, student) if teacher else None
    weights, guidance = (
        (led.text, led.student) if led else (student.text, student.student),
        led.guidance if led else 1.0,
    )
    engines: dict[str, Engine] = {
        f"{count}, one noise": GuidedTeacher(student.config, student.codec, *weights, steps=count, guidance=guidance)
        for count in (50, 8, 4)
    }
    engines |= {f"{count}, fresh noise": Engine(with_steps(student.config, count), *parts) for count in (8, 4)}
    for name, engine in engines.items():
        every = np.ones((engine.config.height, engine.config.width), bool)
        state, controls = engine.open(7), Controls(PROMPT)
        engine.step(state, controls)
        found: dict[float, list[tuple[float, float, float]]] = {limit: [] for limit in THRESHOLDS}
        for _ in range(chunks):
            begun = deepcopy(state)
            engine.step_cache, start_s = 0.0, process_time()
            exact = engine.step(state, controls)
            exact_s = process_time() - start_s
            for limit in THRESHOLDS:
                twin = deepcopy(begun)
                engine.step_cache, start_s = limit, process_time()
                made = engine.step(twin, controls)
                spent_s = process_time() - start_s
                near, alike = (of(made.frames_THWC, exact.frames_THWC, every) for of in (psnr, ssim))
                found[limit].append((exact_s / spent_s, near or 0.0, alike or 0.0))
        for limit, rows in found.items():
            faster, *like_ = np.mean(rows, 0)
            print(f"| {name} | {limit:g} | {faster:.2f} | {like_[0]:.1f} | {like_[1]:.3f} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
