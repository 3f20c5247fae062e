"""Bases to inspect and load: the built-in one, and copies of it whose settings a test can edit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sdlora.config import BaseSection
from sdlora.models.hub import BUILTIN
from sdlora.models.info import BaseInfo, inspect_base
from sdlora.models.load import load_base, load_stock_pipeline
from sdlora.models.stable_diffusion import StableDiffusion


@pytest.fixture
def copy_base(tmp_path: Path) -> Callable[..., Path]:
    """Copies the built-in base, weights as links; `copy("b", unet__config={...})` edits JSON files."""

    def copy(name: str = "base", **edits: dict[str, Any]) -> Path:
        folder = tmp_path / name
        for file in BUILTIN.rglob("*"):
            place = folder / file.relative_to(BUILTIN)
            if file.is_dir():
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            if file.suffix == ".safetensors":
                place.symlink_to(file)
            else:
                shutil.copyfile(file, place)
        for where, changes in edits.items():
            file = folder / (where.replace("__", "/") + ".json")
            values = json.loads(file.read_text(encoding="utf-8"))
            file.write_text(json.dumps({**values, **changes}), encoding="utf-8")
        return folder

    return copy


@pytest.fixture(scope="session")
def info() -> BaseInfo:
    """The built-in base, inspected."""
    return inspect_base(BaseSection())


@pytest.fixture(scope="session")
def _base(info: BaseInfo) -> StableDiffusion:
    return load_base(info, dtype=torch.float32, device="cpu")


@pytest.fixture
def base(_base: StableDiffusion) -> StableDiffusion:
    """The built-in base in fp32 on the CPU; tests leave it as it is."""
    return _base


@pytest.fixture(scope="session")
def stock(info: BaseInfo) -> Any:
    """The built-in base as a stock diffusers pipeline."""
    return load_stock_pipeline(info)
