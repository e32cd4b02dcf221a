"""docs/errors.md against the code: every stable code is there with the files that raise it, and none is dead."""

import ast
import re
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROOMS = ("app", "pipeline", "streaming")
ERRORS = ("AppError", "PipelineError", "WireError")
ROW = re.compile(r"^\| `(\w+)` \| ((?:`[^`]+` ?)+)\| [^|]+ \| [^|]+ \|$", re.MULTILINE)


def raised() -> dict[str, set[str]]:
    """Codes as they are written where an error is made, and the files that do."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for path in (path for room in ROOMS for path in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(func=ast.Name(id=kind), args=[ast.Constant(value=str(code)), *_]) if kind in ERRORS:
                    found[code].add(path.relative_to(ROOT).as_posix())
    return dict(found)


def told() -> list[tuple[str, set[str]]]:
    text = (ROOT / "docs" / "errors.md").read_text()
    return [(code, set(re.findall(r"`([^`]+)`", where))) for code, where in ROW.findall(text)]


def test_the_page_of_errors_tells_every_code_and_where_it_is_raised_and_no_other() -> None:
    assert dict(told()) == raised()


def test_the_page_of_errors_tells_each_code_once_and_every_row_can_be_read() -> None:
    rows = [line for line in (ROOT / "docs" / "errors.md").read_text().splitlines() if line.startswith("| `")]
    assert len(told()) == len(rows) == len(dict(told()))
