"""The command as a person uses it: what it prints and how it ends."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("STILLSTREAM_")}


def _run(*words: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "app", *words],
        capture_output=True,
        text=True,
        timeout=60,
        env=ENVIRONMENT | environment,
        check=False,
    )


def test_the_version_is_told() -> None:
    assert re.fullmatch(r"stillstream \d+\.\d+\.\d+\n", _run("--version").stdout)


def test_help_names_every_command() -> None:
    text = _run("--help").stdout

    assert all(command in text for command in ("serve", "generate", "bench", "train", "doctor"))


@pytest.mark.parametrize(
    ("words", "environment", "code"),
    [
        (("serve", "--port", "99999"), {}, "setting_invalid"),
        (("serve",), {"STILLSTREAM_PORT": "eight"}, "setting_invalid"),
        (("serve",), {"STILLSTREAM_ICE_SERVERS": "nonsense"}, "setting_invalid"),
        (("serve", "--host", "203.0.113.1"), {}, "address_unusable"),
    ],
)
def test_a_wrong_setting_is_one_clear_line(words: tuple[str, ...], environment: dict[str, str], code: str) -> None:
    ended = _run(*words, **environment)

    assert ended.returncode == 2
    assert ended.stderr.startswith(f"{code}: ")
    assert len(ended.stderr.splitlines()) == 1


def test_a_taken_port_is_one_clear_line() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        ended = _run("serve", "--port", str(port))

    assert ended.returncode == 2
    assert ended.stderr == (
        f"port_taken: Port {port} on 127.0.0.1 is taken by another program. "
        "Stop it, or choose another port with --port.\n"
    )


def test_a_model_that_is_missing_is_one_clear_line(tmp_path: Path) -> None:
    ended = _run("generate", "--prompt", "a red ball", "--model", str(tmp_path), "--out", str(tmp_path / "clip.mp4"))

    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("moment", ["while the model loads", "when all is ready"])
def test_ctrl_c_ends_a_server_quietly(moment: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "app", "serve", "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=ENVIRONMENT | {"PYTHONUNBUFFERED": "1"},
    ) as server:
        assert server.stdout is not None
        said = server.stdout.readline()
        while moment == "when all is ready" and said and "ready: model" not in said:
            said = server.stdout.readline()
        server.send_signal(signal.SIGINT)
        rest = server.stdout.read()

    assert said
    assert server.returncode == 0
    assert rest == ""


def test_the_doctor_names_what_is_there_and_what_is_missing(tmp_path: Path) -> None:
    ended = _run("doctor", "--model", str(tmp_path), COLUMNS="200")

    assert ended.returncode == 1
    assert re.search(r"ok +torch +\d", ended.stdout)
    assert re.search(r"missing +weights +.* Name a model folder", ended.stdout)
