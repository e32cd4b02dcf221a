"""The tiny codec of Wan's latents over chosen tiles: processor time of a chunk on one thread, as Markdown.

    python benchmarks/tiles.py --size 480x320 --chunks 3

TAEHV's shape with random weights: what a layer costs does not hang on what its weights say. The tiles lie in one
rectangle, and scattered. All kinds take turns, and the quickest chunk of each counts.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pipeline.tiles import Tiles
from pipeline.tiny_codec import TinyDecoder, TinyEncoder

SHARES = (0.1, 0.2, 0.3, 0.7)
LATENT_FRAMES = 3  # of a chunk


def block(rows: int, columns: int, count: int) -> np.ndarray:
    """So many tiles in the middle, as near to a square as they come."""
    y, x = np.mgrid[:rows, :columns]
    away = np.maximum(abs(y - (rows - 1) / 2), abs(x - (columns - 1) / 2))
    mask = np.zeros(rows * columns, bool)
    mask[np.argsort(away.flat, kind="stable")[:count]] = True
    return mask.reshape(rows, columns)


def scattered(rows: int, columns: int, count: int) -> np.ndarray:
    mask = np.zeros(rows * columns, bool)
    mask[np.random.default_rng(0).permutation(rows * columns)[:count]] = True
    return mask.reshape(rows, columns)


def measure(calls: dict[str, Callable[[], Tensor]], chunks: int) -> dict[str, float]:
    """Milliseconds of the quickest call of each."""
    spent = dict.fromkeys(calls, float("inf"))
    for _ in range(chunks):
        for name, call in calls.items():
            started_s = time.process_time()
            call()
            spent[name] = min(spent[name], 1000 * (time.process_time() - started_s))
    return spent


@torch.inference_mode()
def rows_of(width: int, height: int, chunks: int) -> list[str]:
    torch.manual_seed(0)
    decoder, encoder = TinyDecoder().eval(), TinyEncoder().eval()
    rows, columns = height // 32, width // 32
    latents = torch.randn(LATENT_FRAMES, 16, height // 8, width // 8)
    pictures = torch.rand(4 * LATENT_FRAMES, 3, height, width) * 2 - 1
    masks = {"all tiles": np.ones((rows, columns), bool)}
    for share in SHARES:
        count = round(share * rows * columns)
        masks[f"{share:.0%}, one block"] = block(rows, columns, count)
        masks[f"{share:.0%}, scattered"] = scattered(rows, columns, count)
    found = []
    for whole, part in ((decoder.decode_push, decoder.decode_tiles), (encoder.encode_push, encoder.encode_tiles)):
        x = latents if part == decoder.decode_tiles else pictures
        plain, memory = decoder.remember(), decoder.remember()
        whole(plain, x), part(memory, x, None), part(memory, x, None)  # type: ignore[arg-type]
        calls: dict[str, Callable[[], Tensor]] = {"dense": lambda whole=whole, plain=plain, x=x: whole(plain, x)}
        for name, mask in masks.items():
            tiles = Tiles.of(mask)
            calls[name] = lambda part=part, memory=memory, x=x, tiles=tiles: part(memory, x, tiles)
        found.append(measure(calls, chunks))
    lines = ["| tiles | decode ms | of dense | encode ms | of dense |", "|---|---:|---:|---:|---:|"]
    for name in found[0]:
        cells = [f"{each[name]:.0f} | {each[name] / each['dense']:.2f}" for each in found]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="480x320", help="multiples of 32")
    parser.add_argument("--chunks", type=int, default=3)
    told = parser.parse_args()
    torch.set_num_threads(1)
    width, height = map(int, told.size.split("x"))
    print(f"torch {torch.__version__}, one thread, {width}x{height}, {LATENT_FRAMES} latent frames a chunk\n")
    print("\n".join(rows_of(width, height, told.chunks)))


if __name__ == "__main__":
    main()
