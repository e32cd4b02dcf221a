"""`stillstream doctor`: what this machine can do, what is missing, and what to do about it.

Every check is a function that returns findings; nothing here changes anything.
"""

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter

import psutil

from app.errors import SPOKEN, AppError
from app.worker import default_threads, usable_cores
from pipeline.config import WanModel

OK, WARN, MISSING = "ok", "warn", "missing"
PACKAGES = ("torch", "diffusers", "aiortc", "av", "fastapi")
MATMUL_SIZE = 768
MEMORY_GB = 2.5
CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@dataclass(frozen=True)
class Finding:
    """One line. level: ok, warn, or missing (essential)."""

    level: str
    what: str
    fact: str
    remedy: str = ""


def examine(choose: Callable[[], Path | WanModel | None], host: str, port: int) -> Iterator[Finding]:
    """All findings, as they are found. choose: says which model is meant, or why there is none."""
    yield from _python()
    yield from _packages()
    yield from _machine()
    yield from _torch()
    yield from _xformers()
    yield from _codecs()
    yield from _port(host, port)
    yield from _weights(choose)
    yield from _browser()


def _python() -> Iterator[Finding]:
    fine = sys.version_info >= (3, 11)
    yield Finding(OK if fine else MISSING, "python", platform.python_version(), "" if fine else "Use 3.11 or newer.")


def _packages() -> Iterator[Finding]:
    for name in PACKAGES:
        try:
            yield Finding(OK, name, version(name))
        except PackageNotFoundError:
            yield Finding(MISSING, name, "not installed", "Run `make run` once, or `pip install .`.")


def _machine() -> Iterator[Finding]:
    cores = usable_cores()
    yield Finding(OK, "cores", f"{cores} usable of {os.cpu_count()}, {default_threads()} threads for generation")
    free_gb = psutil.virtual_memory().available / 2**30
    remedy = "" if free_gb >= MEMORY_GB else f"Close other programs: {MEMORY_GB} GB are needed."
    yield Finding(OK if not remedy else WARN, "memory", f"{free_gb:.1f} GB free", remedy)


def _torch() -> Iterator[Finding]:
    if find_spec("torch") is None:
        return
    import torch

    yield Finding(OK, "instruction set", torch.backends.cpu.get_cpu_capability())
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").is_file() else []
    has_bf16 = "avx512_bf16" in flags or "amx_bf16" in flags
    yield Finding(OK, "bf16 in hardware", "yes" if has_bf16 else "no; float32 is used")
    if torch.cuda.is_available():
        yield Finding(OK, "gpu", torch.cuda.get_device_name())
    else:
        yield Finding(OK, "gpu", "none; the CPU is enough for the pocket student")
    torch.set_num_threads(default_threads())
    yield Finding(OK, "matmul rate", f"{_matmul_gflops(torch.rand):.0f} GFLOP/s in float32")


def _matmul_gflops(draw: Callable[..., object]) -> float:
    """The best of a few: what the machine can do when nothing disturbs it."""
    left, right = draw(MATMUL_SIZE, MATMUL_SIZE), draw(MATMUL_SIZE, MATMUL_SIZE)
    best_s = float("inf")
    for _ in range(8):
        started_s = perf_counter()
        left @ right  # type: ignore[operator]
        best_s = min(best_s, perf_counter() - started_s)
    return float(2 * MATMUL_SIZE**3 / best_s / 1e9)


def _xformers() -> Iterator[Finding]:
    """Read from its metadata: importing it on a machine that it does not fit can end the process."""
    try:
        installed = version("xformers")
    except PackageNotFoundError:
        yield Finding(OK, "xformers", "not installed; only a GPU would use it")
        return
    wanted = next((need for need in requires("xformers") or [] if need.startswith("torch")), "torch")
    import torch

    pinned = wanted.partition("==")[2].strip()
    fits = torch.cuda.is_available() and torch.__version__.startswith(pinned)
    if fits:
        yield Finding(OK, "xformers", f"{installed} fits")
    else:
        why = "this machine has no GPU" if not torch.cuda.is_available() else f"it wants {wanted}"
        yield Finding(
            WARN, "xformers", f"{installed} is not used: {why}", "Uninstall it, or install the one that fits."
        )


def _codecs() -> Iterator[Finding]:
    if find_spec("av") is None:
        return
    from av.codec import Codec
    from av.codec.codec import UnknownCodecError

    for name, purpose, level in (
        ("libx264", "H.264 for browsers and mp4", MISSING),
        ("libvpx", "VP8 for browsers", MISSING),
        ("libvpx-vp9", "webm clips", WARN),
        ("libwebp_anim", "webp clips", WARN),
    ):
        try:
            Codec(name, "w")
            yield Finding(OK, f"codec {name}", purpose)
        except UnknownCodecError:
            yield Finding(level, f"codec {name}", f"not in this build of PyAV: {purpose}", "Reinstall av with pip.")


def _port(host: str, port: int) -> Iterator[Finding]:
    from app.serve import bind

    try:
        bind(host, port).close()
        yield Finding(OK, "port", f"{port} is free")
    except AppError as error:
        yield Finding(WARN, "port", error.message.rstrip("."), error.remedy)


def _weights(choose: Callable[[], Path | WanModel | None]) -> Iterator[Finding]:
    if find_spec("torch") is None:
        return
    from app.stopwatch import Stopwatch
    from app.worker import LoadEngine

    try:
        config = LoadEngine(choose(), "cpu", default_threads())(Stopwatch().trace).config
    except SPOKEN as error:
        yield Finding(MISSING, "weights", error.message, error.remedy)
    else:
        size = f"{config.width} x {config.height} at {config.fps} fps"
        yield Finding(OK, "weights", f"{config.name}: whole, checksum right, {size}")


def _browser() -> Iterator[Finding]:
    found = next(filter(None, map(shutil.which, CHROMIUMS)), None)
    cached = sorted(Path("~/.cache/ms-playwright").expanduser().glob("chromium*"))
    if found or cached:
        yield Finding(OK, "chromium", f"{found or cached[-1]} (for tests only)")
    else:
        yield Finding(WARN, "chromium", "not found; only the tests need it", "`make test` installs it.")
