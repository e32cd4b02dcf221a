"""A family by its commands alone, each a process of its own: from a hub to a browser, and away again."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from playwright.sync_api import Browser
from safetensors.torch import save_file

from tests.app import hub
from tests.app.tiny_wan import ROW, repos
from tests.e2e.conftest import pages
from tests.e2e.running import serving
from tests.e2e.viewer import Viewer, wait_until
from tests.pipeline.published import peft_lora

COMMAND = (sys.executable, "-m", "tests.app.tiny_wan")


def said(environment: dict[str, str], *words: str) -> str:
    done = subprocess.run([*COMMAND, *words], capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    return " ".join(done.stdout.split())


def watch(viewer: Viewer) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Messages from the page and from the server, as they come."""
    sent: list[dict[str, Any]] = []
    heard: list[dict[str, Any]] = []

    def listen(socket: Any) -> None:
        socket.on("framesent", lambda text: sent.append(json.loads(text)))
        socket.on("framereceived", lambda text: heard.append(json.loads(text)))

    viewer.page.on("websocket", listen)
    return sent, heard


@pytest.mark.e2e
def test_a_family_is_pulled_converted_verified_served_to_a_browser_and_removed(
    browser: Browser, tmp_path: Path
) -> None:
    style = tmp_path / "style.safetensors"
    save_file(peft_lora(["blocks.0.attn1.to_q"], {"blocks.0.attn1.to_q.weight": torch.Size((24, 24))}), style)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("STILLSTREAM_", "HF_"))}
    environment = clean | {
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "STILLSTREAM_MODELS": str(tmp_path / "models"),
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "COLUMNS": "200",
    }
    with hub.serving(repos()) as endpoint:
        pulled = said(environment | {"HF_ENDPOINT": endpoint}, "models", "pull", ROW.name, "--accept-licence")
    assert pulled.count("hashes right") == 4 and pulled.endswith(f"models convert {ROW.name}")
    environment |= {"HF_ENDPOINT": "http://127.0.0.1:9"}  # from here on the hub is away
    assert said(environment, "models", "convert", ROW.name, "--half").startswith("Made ")
    assert said(environment, "models", "verify", ROW.name).count(" right.") > 5
    assert "here converted" in said(environment, "models", "info", ROW.name, "--size", "64x64")

    serve = (*COMMAND, "serve", "--model", ROW.name, "--size", "64x64", "--lora", str(style), "--lora-strength", "0.8")
    with serving(tmp_path / "log.txt", serve, environment) as server, pages(server, browser) as open_page:
        viewer = open_page()
        page, (sent, heard) = viewer.page, watch(viewer)

        def taken_on(field: str, value: object) -> bool:
            """Whether a chunk was drawn by what the page asked for."""
            page.wait_for_timeout(50)  # messages are only handed over while Playwright runs
            acks = {each["id"] for each in heard if each["kind"] == "ack"}
            return any(each.get(field) == value and each["id"] in acks for each in sent)

        viewer.ask("a red ball bounces")
        viewer.wait_for_state("live", 120)
        viewer.wait_for_frames()
        first = viewer.picture()
        assert first is not None and first.std() > 8, "the picture is flat"
        wait_until(lambda: np.abs(viewer.picture() - first).max() > 40, "a picture that changed")
        assert (page.input_value("#lora"), page.inner_text("#lora_strength-value")) == ("style", "80 %")
        for transition, prompt in (("glide", "a blue ball in the park"), ("recache", "the blue ball")):
            page.select_option("#transition", transition)
            viewer.ask(prompt)
            wait_until(lambda: "Applied in" in page.inner_text("#applied"), f"{prompt}, {transition}")
            wait_until(partial(taken_on, "transition", transition), transition)
            wait_until(partial(taken_on, "prompt", prompt), prompt)
        page.fill("#lora_strength", "0.2")
        wait_until(lambda: taken_on("lora_strength", 0.2), "weaker low-rank weights")
        page.select_option("#lora", "")
        wait_until(lambda: taken_on("lora", ""), "no low-rank weights")
        viewer.wait_for_frames()
        assert viewer.trouble == ""
        viewer.leave()

    listed = said(environment, "models", "list")
    assert listed.count(" converted") == 1
    assert "free again" in said(environment, "models", "remove", ROW.name, "--yes")
    assert " converted" not in said(environment, "models", "list")
    assert not (tmp_path / "models" / ROW.name).exists()
