"""LPIPS is there where its parts are on the disk, and nowhere else."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from app.perceptual import BACKBONE, PACKAGES, find_lpips, perceived

AREA = np.zeros((96, 160), bool)
AREA[32:64, 128:160] = True


class Apart(nn.Module):
    """Mean difference, in the place of a network; it keeps the sizes that it was shown."""

    def __init__(self, net: str = "", verbose: bool = True) -> None:
        super().__init__()
        self.net, self.sizes = net, []  # type: ignore[var-annotated]

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        self.sizes.append(tuple(one.shape))
        return (one - other).abs().mean((1, 2, 3), keepdim=True)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Path]:
    before = torch.hub.get_dir()
    torch.hub.set_dir(tmp_path)
    yield tmp_path / "checkpoints" / BACKBONE
    torch.hub.set_dir(before)


def absent(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PACKAGES:
        monkeypatch.setitem(sys.modules, name, None)


def with_package(monkeypatch: pytest.MonkeyPatch, package: str = "lpips") -> None:
    module = ModuleType(package)
    module.LPIPS = module.LearnedPerceptualImagePatchSimilarity = Apart  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, package, module)


def test_without_the_backbones_weights_there_is_none(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_package(monkeypatch)
    assert find_lpips() is None


def test_without_a_package_there_is_none(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.parent.mkdir()
    hub.touch()
    absent(monkeypatch)
    assert find_lpips() is None


@pytest.mark.parametrize("package", PACKAGES)
def test_with_both_it_is_the_packages_own(hub: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    hub.parent.mkdir()
    hub.touch()
    absent(monkeypatch)
    with_package(monkeypatch, package)
    found = find_lpips()
    assert isinstance(found, Apart)
    assert found.net == ("alex" if package == "lpips" else "")
    assert not found.training


def test_the_area_alone_is_compared_with_enough_around_it_to_see_anything() -> None:
    rng, distance = np.random.default_rng(0), Apart()
    one, other = rng.integers(0, 256, (2, 8, 96, 160, 3), dtype=np.uint8)
    found = perceived(distance, one, other, AREA)
    differs = np.abs(one[:, AREA].astype(float) - other[:, AREA]).mean() / 127.5
    assert found == pytest.approx(differs / 4, rel=1e-3)
    assert distance.sizes == [(8, 3, 64, 64)]


def test_of_nothing_or_by_nothing_there_is_no_distance() -> None:
    frames = np.zeros((8, 96, 160, 3), np.uint8)
    assert perceived(None, frames, frames, AREA) is None
    assert perceived(Apart(), frames, frames, np.zeros_like(AREA)) is None
