"""Bases to inspect and load: the built-in one, and copies of it whose settings a test can edit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from sdlora.config import BaseSection
from sdlora.models.folder import BUILTIN
from sdlora.models.info import BaseInfo, inspect_base
from sdlora.models.load import load_base
from sdlora.models.stable_diffusion import StableDiffusion
from tests.stock import load_stock_pipeline


@pytest.fixture
def copy_base(copy_folder: Callable[..., Path]) -> Callable[..., Path]:
    """Copies the built-in base, weights as links; `copy("b", unet__config={...})` edits JSON files."""
    return partial(copy_folder, BUILTIN)


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


@pytest.fixture(scope="session")
def sdxl_info(sdxl_folder: Path) -> BaseInfo:
    """A tiny SDXL base, inspected."""
    return inspect_base(BaseSection(source=str(sdxl_folder)))


@pytest.fixture(scope="session")
def sdxl(sdxl_info: BaseInfo) -> StableDiffusion:
    """A tiny SDXL base in fp32 on the CPU; tests leave it as it is."""
    return load_base(sdxl_info, dtype=torch.float32, device="cpu")


@pytest.fixture(scope="session")
def sdxl_stock(sdxl_info: BaseInfo) -> Any:
    """The tiny SDXL base as a stock diffusers pipeline."""
    return load_stock_pipeline(sdxl_info)
