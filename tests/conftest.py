"""Fixtures that every test folder shares: one thread, no network, a cache of its own, small pictures."""

from __future__ import annotations

import os

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

torch.set_num_threads(1)

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps the latent cache of a test away from the user's."""
    monkeypatch.setenv("SDLORA_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def shared_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """One cache for the tests that use a whole dataset, so that each picture is encoded once."""
    root = tmp_path_factory.getbasetemp()
    common = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    monkeypatch.setenv("SDLORA_CACHE", str(common / "shared-cache"))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture
def make_images(tmp_path: Path) -> Callable[..., Path]:
    """Makes a captioned folder of small drawings, one for each size given."""

    def make(name: str = "pictures", sizes: tuple[tuple[int, int], ...] = ((64, 64),) * 4) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        for number, (width, height) in enumerate(sizes):
            image = Image.new("RGB", (width, height), "white")
            colour = ((37 * number) % 256, (91 * number) % 256, (151 * number) % 256)
            ImageDraw.Draw(image).ellipse(
                (8, 8, width - 8, height - 8), fill=colour, outline="black", width=3
            )
            image.save(folder / f"{number:02d}.png")
            (folder / f"{number:02d}.txt").write_text(f"a circle number {number}", encoding="utf-8")
        return folder

    return make
