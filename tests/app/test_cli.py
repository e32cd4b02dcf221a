"""The command as a person uses it: what it prints and how it ends."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from app import cli
from app.clip import read_clip
from app.clip import write_clip as write_video
from pipeline.training.precomputed import UNPROMPTED, write_clip, write_unprompted
from tests.app.tiny import TINY, write_tiny_model
from tests.pipeline.published import peft_lora

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("STILLSTREAM_")}


def _run(*words: str, cwd: Path = ROOT, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "app", *words],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd,
        env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)} | environment,
        check=False,
    )


def test_the_version_is_told() -> None:
    assert re.fullmatch(r"stillstream \d+\.\d+\.\d+\n", _run("--version").stdout)


def test_help_names_every_command() -> None:
    text = _run("--help").stdout

    assert all(command in text for command in ("serve", "generate", "bench", "train", "eval", "models", "doctor"))


@pytest.mark.parametrize(
    ("words", "environment", "code"),
    [
        (("serve", "--port", "99999"), {}, "setting_invalid"),
        (("serve",), {"STILLSTREAM_PORT": "eight"}, "setting_invalid"),
        (("serve",), {"STILLSTREAM_ICE_SERVERS": "nonsense"}, "setting_invalid"),
        (("serve", "--host", "203.0.113.1"), {}, "address_unusable"),
        (("serve", "--threads", "0"), {}, "setting_invalid"),
        (("generate", "--prompt", "x", "--strength", "7"), {}, "setting_invalid"),
        (("generate", "--prompt", "x", "--regions", "2"), {}, "setting_invalid"),
        (("generate", "--prompt", "x", "--show-tiles"), {}, "setting_invalid"),
        (("generate",), {}, "setting_invalid"),
        (("dream",), {}, "setting_invalid"),
        (("doctor", "--port", "99999"), {}, "setting_invalid"),
        (("models", "pull", "longlive"), {}, "licence_not_accepted"),
    ],
)
def test_a_wrong_setting_is_one_clear_line(words: tuple[str, ...], environment: dict[str, str], code: str) -> None:
    ended = _run(*words, **environment)

    assert ended.returncode == 2
    assert ended.stderr.startswith(f"{code}: ")
    assert len(ended.stderr.splitlines()) == 1


def test_the_bare_command_shows_its_help() -> None:
    ended = _run()

    assert ended.returncode == 2
    assert "serve" in ended.stdout and "setting_invalid" not in ended.stderr


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


def _is_one_line(ended: "subprocess.CompletedProcess[str]", code: str) -> bool:
    """Exit code 2 and one sentence for a person, below what a progress bar may have left."""
    said = ended.stderr.strip().splitlines()
    return ended.returncode == 2 and said[-1].startswith(f"{code}: ") and "Traceback" not in ended.stderr


@pytest.mark.parametrize("command", [("serve", "--port", "0"), ("generate", "--prompt", "a red ball")])
@pytest.mark.parametrize("code", ["weights_missing", "weights_damaged"])
def test_weights_that_are_missing_or_damaged_are_one_clear_line(
    tiny_model: Path, tmp_path: Path, command: tuple[str, ...], code: str
) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    student = model / "student.safetensors"
    if code == "weights_missing":
        student.unlink()
    else:
        student.write_bytes(student.read_bytes()[:-1])
    ended = _run(*command, "--model", str(model), cwd=tmp_path)

    assert _is_one_line(ended, code), ended.stderr
    assert "student.safetensors" in ended.stderr
    assert list(tmp_path.iterdir()) == [model]


def test_low_rank_weights_of_other_shapes_are_one_clear_line_and_leave_no_server(
    tiny_model: Path, tmp_path: Path
) -> None:
    wrong = tmp_path / "wrong.safetensors"
    save_file(peft_lora(["blocks.0.attn1.to_q"], {"blocks.0.attn1.to_q.weight": torch.Size((48, 24))}), wrong)
    # Its output ends when the last process that holds it has ended, the worker among them.
    ended = _run("serve", "--port", "0", "--model", str(tiny_model), "--lora", str(wrong), cwd=tmp_path)

    assert _is_one_line(ended, "lora_mismatch"), ended.stderr
    assert "takes 24x24, the file has 48x3 times 3x24" in ended.stderr
    assert list(tmp_path.iterdir()) == [wrong]
    assert len(ended.stderr.splitlines()) == 1
    found = re.search(r"http://127\.0\.0\.1:(\d+)", ended.stdout)
    assert found is not None, "the page is there while the model loads"
    with socket.socket() as caller, pytest.raises(ConnectionRefusedError):
        caller.connect(("127.0.0.1", int(found[1])))


@pytest.mark.parametrize(
    ("words", "code"),
    [(("--input", "notes.mp4"), "clip_unreadable"), (("--device", "abacus"), "device_unusable")],
)
def test_a_clip_that_cannot_be_made_is_one_clear_line_and_leaves_nothing(
    tiny_model: Path, tmp_path: Path, words: tuple[str, ...], code: str
) -> None:
    notes = tmp_path / "notes.mp4"
    notes.write_text("not a video")
    ended = _run("generate", "--prompt", "a red ball", *words, "--model", str(tiny_model), cwd=tmp_path)

    assert _is_one_line(ended, code), ended.stderr
    assert list(tmp_path.iterdir()) == [notes]


def test_a_clip_is_written_and_the_same_seed_makes_the_same_latents(tiny_model: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        words = ("--seconds", "0.5", "--seed", "3", "--out", f"{name}.mp4", "--latents", f"{name}.safetensors")
        ended = _run("generate", "--prompt", "red dragon", *words, "--model", str(tiny_model), cwd=tmp_path)
        assert (ended.returncode, ended.stdout) == (0, f"Wrote {name}.mp4\n"), ended.stderr
        assert ended.stderr.endswith("This model does not know: dragon.\n")

    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    assert len(list(read_clip(tmp_path / "one.mp4", TINY.fps, TINY.width, TINY.height))) == 8


def test_passes_that_a_model_was_not_made_for_are_drawn_and_told_and_its_own_number_is_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "calm_openmp", lambda threads: None)
    uneven = replace(TINY, sampler=replace(TINY.sampler, steps=(1000, 600)))
    free = replace(uneven, sampler=replace(uneven.sampler, any_steps=True))
    for name, config in (("made-for-two", uneven), ("free", free)):
        write_tiny_model(tmp_path / name, replace(config, name=name))

    def drawn(model: str, *words: str) -> tuple[bytes, str]:
        latents, out = tmp_path / "latents.safetensors", str(tmp_path / "clip.mp4")
        line = ("generate", "--prompt", "ball", "--seconds", "0.25", "--threads", "1", "--out", out, *words)
        ended = CliRunner().invoke(cli.app, [*line, "--model", str(tmp_path / model), "--latents", str(latents)])
        assert ended.exit_code == 0, ended.output
        return latents.read_bytes(), ended.stderr

    told = "made-for-two was made for 2 denoise passes and knows no other number. Drawn in 9 all the same.\n"
    own, said = drawn("made-for-two")
    assert "passes" not in said
    same, said = drawn("made-for-two", "--steps", "2")
    assert same == own and "passes" not in said
    for more in ((), ("--step-cache", "0.1")):
        other, said = drawn("made-for-two", "--steps", "9", *more)
        assert other != own and said.startswith(told)
    other, said = drawn("free", "--steps", "9")
    assert other != own and "passes" not in said


def test_a_clip_keeps_closer_to_a_fast_video_where_that_is_asked_for(tiny_model: Path, tmp_path: Path) -> None:
    pictures_THWC = np.zeros((8, TINY.height, TINY.width, 3), np.uint8)
    pictures_THWC[1::2] = 255
    with write_video(tmp_path / "fast.mp4", TINY.fps) as clip:
        clip.write(pictures_THWC)
    for name, words in (("unsaid", ()), ("closer", ("--motion-aware",))):
        words = (*words, "--input", "fast.mp4", "--out", f"{name}.mp4", "--latents", f"{name}.safetensors")
        ended = _run("generate", "--prompt", "red ball", *words, "--model", str(tiny_model), cwd=tmp_path)
        assert ended.returncode == 0, ended.stderr

    assert (tmp_path / "unsaid.safetensors").read_bytes() != (tmp_path / "closer.safetensors").read_bytes()


@pytest.mark.parametrize("moment", ["while the model loads", "when all is ready"])
def test_ctrl_c_ends_a_server_quietly(tiny_model: Path, moment: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "app", "serve", "--port", "0", "--model", str(tiny_model)],
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


WAN_RUN = """
recipe = "wan"
data = "encoded"
beside = "model"
precision = "fp32"
[teacher]
steps = 2
batch = 2
[student]
steps = 1
batch = 2
"""


def test_two_processes_under_torchrun_train_a_wan_model_that_then_makes_a_clip(
    tiny_model: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "wan.toml").write_text(WAN_RUN)
    (tmp_path / "encoded").mkdir()
    size, width = (2 * TINY.chunk, TINY.codec.latent_channels, *TINY.latent_size), TINY.student.text_dim
    write_clip(tmp_path / "encoded" / "a.safetensors", torch.randn(size).half(), torch.randn(1, 3, width).half())
    write_unprompted(tmp_path / "encoded" / UNPROMPTED, torch.zeros(1, 1, width))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "app", "train"]
    trained = subprocess.run(
        [sys.executable, *command, "--config", "wan.toml", "--out", "run"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert trained.returncode == 0, trained.stderr
    exported = tmp_path / "run" / "export"
    names = load_file(exported / "transformer" / "diffusion_pytorch_model.safetensors").keys()
    assert {f"model.{name}" for name in names} == load_file(exported / "student.safetensors").keys()

    words = ("--prompt", "red", "--seconds", "0.5", "--model", "run/export", "--out", "clip.mp4")
    ended = _run("generate", *words, cwd=tmp_path)
    assert (ended.returncode, ended.stdout) == (0, "Wrote clip.mp4\n"), ended.stderr


def test_a_wan_run_without_clips_is_one_clear_line(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "wan.toml").write_text(f'recipe = "wan"\ndata = "nowhere"\nbeside = "{tiny_model}"\n')
    ended = _run("train", "--config", "wan.toml", cwd=tmp_path)

    assert _is_one_line(ended, "data_empty"), ended.stderr


@pytest.mark.parametrize(
    ("words", "environment", "asked"),
    [
        (("serve",), {}, "auto"),
        (("serve",), {"STILLSTREAM_TEXT_DEVICE": "swap"}, "swap"),
        (("serve", "--text-device", "cuda:1"), {"STILLSTREAM_TEXT_DEVICE": "swap"}, "cuda:1"),
        (("generate", "--prompt", "a red ball"), {}, "auto"),
        (("generate", "--prompt", "a red ball", "--text-device", "cpu"), {}, "cpu"),
    ],
)
def test_where_the_text_encoder_is_to_be_is_told_by_flag_or_variable(
    words: tuple[str, ...], environment: dict[str, str], asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[str] = []

    def named(*_: object, text_device: str, **__: object) -> None:
        heard.append(text_device)
        raise typer.Exit

    monkeypatch.setattr(cli, "named", named)
    monkeypatch.setattr(cli, "calm_openmp", lambda threads: None)
    CliRunner().invoke(cli.app, words, env=environment)
    assert heard == [asked]


def test_a_question_that_is_broken_off_ends_quietly_as_interrupted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ask(**_: object) -> None:
        raise typer.Abort

    monkeypatch.setattr(cli, "app", ask)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        cli.main()

    assert ended.value.code == 130
    assert capsys.readouterr().err == "Stopped; the question was not answered.\n"
