"""Sampling on SDXL: pooled states and sizes, equal to its stock pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from sdlora.config import BaseSection
from sdlora.formats.files import load_adapter, save_adapter
from sdlora.lora.adapter import Adapter
from sdlora.lora.attach import match_targets, mount
from sdlora.lora.layers import lora_layers
from sdlora.models.info import BaseInfo, inspect_base
from sdlora.models.load import load_base
from sdlora.models.stable_diffusion import StableDiffusion
from sdlora.sampling.generate import encode_prompts
from sdlora.sampling.images import SampledImage, SampleSettings, resolve_settings
from tests.checks import assert_same_image
from tests.lora_fixtures import create_adapter
from tests.sampling.drawing import generate
from tests.stock import load_stock_pipeline

# diffusers' schedulers speak to numpy in an old way.
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

PROMPTS = ["a tractor", "a red apple on a blue background"]
QUICK = SampleSettings(steps=3, width=64, height=64, batch_size=1)


@pytest.fixture(scope="module")
def info(sdxl_folder: Path) -> BaseInfo:
    return inspect_base(BaseSection(source=str(sdxl_folder)))


@pytest.fixture(scope="module")
def base(info: BaseInfo) -> StableDiffusion:
    return load_base(info, dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def adapter(base: StableDiffusion) -> Adapter:
    fresh = create_adapter(
        base.denoiser, match_targets(base.denoiser, ["attention"]), 4, 2, seed=0, family="sdxl"
    )
    generator = torch.Generator().manual_seed(1)
    for pair in fresh.modules.values():
        pair.up = torch.randn(pair.up.shape, generator=generator) * 0.3
        pair.down = pair.down.detach()
    return fresh


def pixels(images: Sequence[SampledImage]) -> np.ndarray[Any, Any]:
    return np.stack([np.asarray(image.image, dtype=np.int32) for image in images])


def stock_images(pipeline: Any, seed: int, settings: SampleSettings) -> np.ndarray[Any, Any]:
    """The same images by plain diffusers calls, one prompt at a time, as sdlora encodes them."""
    images = [
        pipeline(
            prompt,
            negative_prompt=settings.negative_prompt or None,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            width=settings.width,
            height=settings.height,
            generator=torch.Generator().manual_seed(seed),
        ).images[0]
        for prompt in PROMPTS
    ]
    return np.stack([np.asarray(image, dtype=np.int32) for image in images])


@pytest.mark.parametrize(
    "settings",
    [
        QUICK,
        replace(QUICK, guidance=1.0, width=96, height=56),
        replace(QUICK, guidance=5.0, negative_prompt="a blue background", scheduler="DDIM"),
    ],
    ids=lambda settings: f"{settings.scheduler or 'own'}-{settings.guidance}",
)
def test_base_equals_stock_diffusers(base: StableDiffusion, info: BaseInfo, settings: SampleSettings) -> None:
    """R-10, R-31: pooled states, the pipeline's own sizes, and zeros where there is no negative prompt."""
    stock = load_stock_pipeline(info)
    if settings.scheduler:
        stock.scheduler = DDIMScheduler.from_config(stock.scheduler.config)
    expected = stock_images(stock, 3, resolve_settings(info, settings))
    # Another library's loader, batches and buffers: not the same computation.
    assert_same_image(pixels(generate(base, None, PROMPTS, [3], [], settings)), expected)


def test_adapter_equals_stock_diffusers(
    base: StableDiffusion, adapter: Adapter, info: BaseInfo, tmp_path: Path
) -> None:
    """R-01, R-37: the file in a stock SDXL pipeline gives our image at strengths 1 and 0.5."""
    _compare_with_stock(base, adapter, info, tmp_path)


@pytest.mark.parametrize("source", [pytest.param("builtin", marks=pytest.mark.slow), "sdxl"])
def test_text_encoders_equal_stock_diffusers(source: str, sdxl_folder: Path, tmp_path: Path) -> None:
    """R-01, R-34, R-37: prompts are encoded anew at each strength, by one text encoder or two."""
    info = inspect_base(BaseSection(source="builtin" if source == "builtin" else str(sdxl_folder)))
    base = load_base(info, dtype=torch.float32, device="cpu")
    names = match_targets(base.components, ["text_attention", "text_mlp"])
    adapter = create_adapter(base.components, names, 4, 4, seed=0, family=info.family).to()
    generator = torch.Generator().manual_seed(1)
    for pair in adapter.modules.values():
        pair.up.normal_(std=0.5, generator=generator)
    _compare_with_stock(base, adapter, info, tmp_path)
    # Adapters that are mounted for training do not change the base's column.
    plain = generate(base, None, PROMPTS[:1], [0], [], QUICK)
    mount(base.components, [(adapter, 1.0)])
    assert np.array_equal(pixels(generate(base, None, PROMPTS[:1], [0], [], QUICK)), pixels(plain))
    assert lora_layers(base.text_encoders[0])


def _compare_with_stock(base: StableDiffusion, adapter: Adapter, info: BaseInfo, tmp_path: Path) -> None:
    file = save_adapter(tmp_path / "style.safetensors", adapter, metadata={})
    images = generate(base, load_adapter(file), PROMPTS, [0], [1.0, 0.5], QUICK)
    pipeline = load_stock_pipeline(info)
    pipeline.load_lora_weights(str(file), adapter_name="style")
    for part in base.components:
        getattr(pipeline, part).eval()
    plain = pixels([image for image in images if image.strength == 0])
    for strength in (1.0, 0.5):
        pipeline.set_adapters(["style"], [strength])
        ours = pixels([image for image in images if image.strength == strength])
        assert np.abs(ours - stock_images(pipeline, 0, resolve_settings(info, QUICK))).max() <= 2
        assert np.abs(ours - plain).max() > 10


def test_states_encoded_before_give_the_same_images(base: StableDiffusion, adapter: Adapter) -> None:
    """R-10: in training both text encoders have left; pooled states are handed over too."""
    settings = replace(QUICK, negative_prompt="a cat")
    text = encode_prompts(base, PROMPTS, settings)
    before = generate(base, adapter, PROMPTS, [0], [1.0], settings)
    blind = replace(base, tokenizers=())
    after = generate(blind, adapter, PROMPTS, [0], [1.0], settings, text=text)
    assert np.array_equal(pixels(after), pixels(before))
