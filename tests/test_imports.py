"""The rule of the house: who may import whom, and that importing a module does nothing else."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("app", "pipeline", "streaming")
SOURCES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
MODULES = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in SOURCES]

# Run in its own process: imports the modules named on its command line, and stops when one of ours acts by it.
# What a library does while it is imported is its own matter.
PROBE = """
import builtins, importlib, os, socket, subprocess, sys, threading

def guard(holder, name):
    real = getattr(holder, name)
    def guarded(*args, **kwargs):
        caller = os.path.relpath(sys._getframe(1).f_code.co_filename)
        if caller.split(os.sep)[0] in ("app", "pipeline", "streaming"):
            raise SystemExit(f"importing {caller} calls {name}")
        return real(*args, **kwargs)
    setattr(holder, name, guarded)

for holder, name in (
    (os, "getenv"), (os._Environ, "__getitem__"), (os._Environ, "__setitem__"), (os._Environ, "get"),
    (os._Environ, "update"), (builtins, "open"), (builtins, "print"), (builtins, "input"),
    (subprocess.Popen, "__init__"), (threading.Thread, "start"), (socket.socket, "bind"), (socket.socket, "connect"),
):
    guard(holder, name)
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


def imported_by(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} uses a relative import"
            names.add(node.module or "")
    return {name.split(".")[0] for name in names}


FORBIDDEN = {
    "pipeline": {"app", "streaming", "aiortc", "aioice", "asyncio", "socket", "fastapi", "uvicorn"},
    "streaming": {"app", "pipeline", "torch", "diffusers", "safetensors"},
    "app": set(),
}


@pytest.mark.parametrize("room", ROOMS)
def test_no_room_imports_what_it_must_not_know(room: str) -> None:
    found = {
        (str(path.relative_to(ROOT)), name)
        for path in (ROOT / room).rglob("*.py")
        for name in imported_by(path) & FORBIDDEN[room]
    }
    assert found == set()


def test_streaming_loads_no_torch_even_through_its_libraries() -> None:
    names = [name for name in MODULES if name.startswith("streaming")]
    code = f"import {', '.join(names)}, sys; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_importing_any_module_has_no_side_effect() -> None:
    names = [name for name in MODULES if not name.endswith("__main__")]
    result = subprocess.run(
        [sys.executable, "-c", PROBE, *names], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_the_generator_reads_no_clock() -> None:
    generator = [path for path in (ROOT / "pipeline").rglob("*.py") if "training" not in path.parts]
    assert [path for path in generator if imported_by(path) & {"time", "datetime"}] == []


def test_only_the_command_line_reads_arguments_and_environment() -> None:
    readers = {
        str(path.relative_to(ROOT))
        for path in SOURCES
        for text in [path.read_text()]
        # The worker may set what its libraries read; `environ.update` is no reading.
        if re.search(r"\bsys\.argv\b|\bgetenv\(|\benviron\b(?!\.update\()", text)
    }
    assert readers <= {"app/cli.py"}
