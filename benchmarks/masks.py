"""A table of the motion mask alone, without a student: recall and precision of every drawn scene at several dials.

    python benchmarks/masks.py --chunks 16 --seeds 3

Of the seeds together. The figures do not depend on the machine.
"""

from typing import Annotated

import typer

from app.region_figures import recall_and_precision
from app.region_masks import follow
from app.region_scenes import scenes, shoot

WIDTH, HEIGHT = 320, 192  # the pocket student's
DIALS = (0.1, 0.3, 0.5, 1.0)


def main(
    chunks: Annotated[int, typer.Option(min=4)] = 16,
    seeds: Annotated[int, typer.Option(min=1)] = 3,
) -> None:
    heads = [f"recall / precision at {dial}" for dial in DIALS]
    print(_row("scenario", *heads, "dense chunks"), _row("---", *["---:"] * len(heads), "---:"), sep="\n")
    for name in scenes(64, 64):
        found = {dial: [] for dial in DIALS}
        for seed in range(seeds):
            scene = scenes(WIDTH, HEIGHT, seed)[name]
            sources = [shoot(scene, chunk, seed) for chunk in range(scene.chunks or chunks)]
            for dial, each in found.items():
                each.append(follow(sources, dial))
        told, dense = [], set()
        for each in found.values():
            both = recall_and_precision([pair for one in each for pair in one.masks])
            told.append(" / ".join("" if value is None else f"{value:.2f}" for value in both).strip(" /"))
            dense |= {len(one.dense) / len(one.masks) for one in each}
        print(_row(name, *told, " to ".join(f"{share:.2f}" for share in sorted({min(dense), max(dense)}))), flush=True)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    typer.run(main)
