"""Adapters on the built-in base."""

from __future__ import annotations

import pytest
import torch

from sdlora.config import BaseSection
from sdlora.lora.attach import detach, match_targets
from sdlora.models.info import inspect_base
from sdlora.models.load import load_base
from tests.lora_fixtures import create_adapter


@pytest.fixture(scope="package")
def info():
    return inspect_base(BaseSection())


@pytest.fixture(scope="package")
def shared_unet(info):
    return load_base(info, dtype=torch.float32, device="cpu").denoiser


@pytest.fixture
def unet(shared_unet):
    yield shared_unet
    detach(shared_unet)


@pytest.fixture
def make_adapter(unet, info):
    def make(targets=("attention",), rank=4, alpha=2.0, size=0.02):
        names = match_targets(unet, list(targets))
        adapter = create_adapter(unet, names, rank, alpha, seed=0, family=info.family)
        generator = torch.Generator().manual_seed(1)
        for pair in adapter.modules.values():
            pair.up.data.normal_(std=size, generator=generator)
        return adapter

    return make
