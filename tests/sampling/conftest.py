"""The built-in base, and an adapter that changes its pictures visibly."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sdlora.config import BaseSection
from sdlora.lora.adapter import Adapter
from sdlora.lora.attach import match_targets
from sdlora.models.info import BaseInfo, inspect_base
from sdlora.models.load import load_base
from sdlora.models.stable_diffusion import StableDiffusion
from tests.lora_fixtures import create_adapter
from tests.stock import load_stock_pipeline


@pytest.fixture(scope="session")
def info() -> BaseInfo:
    """The built-in base, inspected."""
    return inspect_base(BaseSection())


@pytest.fixture(scope="session")
def base(info: BaseInfo) -> StableDiffusion:
    """The built-in base in fp32 on the CPU; tests leave it as it is."""
    return load_base(info, dtype=torch.float32, device="cpu")


@pytest.fixture(scope="session")
def stock(info: BaseInfo) -> Any:
    """The built-in base as a stock diffusers pipeline."""
    return load_stock_pipeline(info)


@pytest.fixture(scope="session")
def adapter(base: StableDiffusion) -> Adapter:
    """As read from a file: rank 4, alpha 2, on the attention projections, with an effect."""
    fresh = create_adapter(
        base.denoiser, match_targets(base.denoiser, ["attention"]), 4, 2, seed=0, family="sd1"
    )
    generator = torch.Generator().manual_seed(1)
    for pair in fresh.modules.values():
        pair.up = torch.randn(pair.up.shape, generator=generator) * 0.3
        pair.down = pair.down.detach()
    return fresh
