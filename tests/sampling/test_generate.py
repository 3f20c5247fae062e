"""Generation: equal to stock diffusers, repeatable, and without a trace."""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from sdlora.config import BaseSection
from sdlora.formats.files import load_adapter, save_adapter
from sdlora.lora.adapter import Adapter, draw_adapter
from sdlora.lora.attach import detach, match_targets, mount
from sdlora.lora.layers import lora_layers
from sdlora.models.base import quiet
from sdlora.models.folder import BUILTIN
from sdlora.models.info import BaseInfo, inspect_base
from sdlora.models.load import load_base
from sdlora.models.stable_diffusion import StableDiffusion
from sdlora.sampling import generate as sampling
from sdlora.sampling.generate import Column, encode_prompts, make_columns
from sdlora.sampling.images import (
    FLAGGED,
    NOT_FINITE,
    SampledImage,
    SampleSettings,
    StartImage,
    resolve_settings,
)
from tests.checks import assert_same_image
from tests.lora_fixtures import create_adapter
from tests.sampling.drawing import generate
from tests.stock import load_stock_pipeline

# diffusers' schedulers speak to numpy in an old way.
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

PROMPTS = ["a tractor", "a red apple on a blue background"]
QUICK = SampleSettings(steps=3, width=64, height=64)


def pixels(images: Sequence[SampledImage | Image.Image]) -> np.ndarray[Any, Any]:
    """(N, H, W, 3) as signed integers."""
    return np.stack(
        [np.asarray(i.image if isinstance(i, SampledImage) else i, dtype=np.int32) for i in images]
    )


def stock_images(
    pipeline: Any, rows: Sequence[tuple[str, int]], settings: SampleSettings
) -> np.ndarray[Any, Any]:
    """The same images by a plain diffusers call."""
    return pixels(
        pipeline(
            [prompt for prompt, _ in rows],
            negative_prompt=[settings.negative_prompt] * len(rows),
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            width=settings.width,
            height=settings.height,
            generator=[torch.Generator().manual_seed(seed) for _, seed in rows],
        ).images
    )


@pytest.mark.parametrize(
    "settings",
    [
        SampleSettings(steps=3),
        SampleSettings(steps=3, guidance=1.0, width=96, height=120),
        SampleSettings(steps=4, guidance=5.0, negative_prompt="a blue background", width=72, height=64),
        replace(QUICK, scheduler="EulerAncestralDiscreteScheduler"),
        replace(QUICK, scheduler="DPMSolverMultistepScheduler"),
        replace(QUICK, scheduler="DDPM", guidance=0),
        SampleSettings(steps=5, scheduler="PNDMScheduler", width=64, height=64),
    ],
    ids=lambda settings: f"{settings.scheduler or 'own'}-{settings.guidance}",
)
def test_base_equals_stock_diffusers(base: StableDiffusion, stock: Any, settings: SampleSettings) -> None:
    """R-10: same seed, scheduler, guidance, size and negative prompt; sdlora adds and takes nothing."""
    seeds = [3, 7]
    resolved = resolve_settings(base.info, settings)
    own = stock.scheduler
    try:
        stock.scheduler = getattr(diffusers, resolved.scheduler or "").from_config(own.config)
        expected = stock_images(stock, [(p, s) for p in PROMPTS for s in seeds], resolved)
    finally:
        stock.scheduler = own
    images = generate(base, None, PROMPTS, seeds, [], settings)
    # Another library's loader and buffers: not the same computation.
    assert_same_image(pixels(images), expected)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_prediction_type_is_the_base_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """R-32, R-39: read from the folder's scheduler, equal to stock diffusers, and without a socket."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a socket was opened")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    for part in BUILTIN.iterdir():
        if part.name != "scheduler":
            (tmp_path / part.name).symlink_to(part)
    (tmp_path / "scheduler").mkdir()
    config = json.loads((BUILTIN / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    edited = json.dumps({**config, "prediction_type": kind, "beta_end": 0.02})
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(edited, encoding="utf-8")
    info = inspect_base(BaseSection(source=str(tmp_path)))
    settings = replace(QUICK, guidance=2.0)
    images = generate(load_base(info, dtype=torch.float32, device="cpu"), None, PROMPTS, [0], [], settings)
    rows = [(prompt, 0) for prompt in PROMPTS]
    expected = stock_images(load_stock_pipeline(info), rows, resolve_settings(info, settings))
    assert_same_image(pixels(images), expected)


def test_adapter_equals_stock_diffusers(
    base: StableDiffusion, adapter: Adapter, info: BaseInfo, tmp_path: Path
) -> None:
    """R-01, R-37: the file in a stock pipeline gives our image at strengths 1 and 0.5, within 2 of 255.

    Not to the bit: peft multiplies the scale at another place, one rounding in float32.
    """
    file = save_adapter(tmp_path / "style.safetensors", adapter, dialect="diffusers", metadata={})
    images = generate(base, load_adapter(file), PROMPTS, [0], [1.0, 0.5], QUICK)
    pipeline = load_stock_pipeline(info)
    pipeline.load_lora_weights(str(file), adapter_name="style")
    pipeline.unet.eval()
    rows = [(prompt, 0) for prompt in PROMPTS]
    for strength in (1.0, 0.5):
        pipeline.set_adapters(["style"], [strength])
        expected = stock_images(pipeline, rows, resolve_settings(info, QUICK))
        ours = pixels([image for image in images if image.strength == strength])
        assert np.abs(ours - expected).max() <= 2
    plain = pixels([image for image in images if image.strength == 0])
    assert np.abs(ours - plain).max() > 50


def test_twice_is_equal_to_the_pixel(base: StableDiffusion, adapter: Adapter) -> None:
    """R-10: whatever the ambient random state, also with a scheduler that draws noise at each step."""
    settings = replace(QUICK, scheduler="EulerAncestralDiscreteScheduler")
    ambient = []
    watch = lambda *_: ambient.append(torch.get_rng_state())
    first = generate(base, adapter, PROMPTS, [0, 1], [1.0], settings, progress=watch)
    torch.manual_seed(123)
    torch.randn(5)
    second = generate(base, adapter, PROMPTS, [0, 1], [1.0], settings, progress=watch)
    # A scheduler that draws from the ambient generator finds it in the same state.
    assert torch.equal(torch.stack(ambient[:2]), torch.stack(ambient[2:]))
    assert np.array_equal(pixels(first), pixels(second))


def test_seed_gives_the_same_noise_everywhere(base: StableDiffusion, adapter: Adapter) -> None:
    """R-10: an image is the same whatever else is asked for, one batch or many (up to rounding)."""
    many = generate(base, adapter, PROMPTS, [5, 0], [1.0, 0.5], QUICK)
    alone = generate(base, adapter, PROMPTS[1:], [0], [0.5], replace(QUICK, batch_size=1))
    same = [p for p in many if (p.prompt, p.seed, p.strength) in {(PROMPTS[1], 0, 0.0), (PROMPTS[1], 0, 0.5)}]
    assert [p.strength for p in alone] == [p.strength for p in same] == [0.0, 0.5]
    assert np.abs(pixels(same) - pixels(alone)).max() <= 2


def test_rows_and_columns(base: StableDiffusion, adapter: Adapter) -> None:
    """R-13: prompt, then seed, then strength, the base always first and once; settings are resolved."""
    done: list[int] = []
    images = generate(
        base,
        adapter,
        PROMPTS,
        [1, 0],
        [0.5, 0, 0.5, 1],
        QUICK,
        progress=lambda finished, total: done.append(finished),
    )
    assert [(p.prompt, p.seed, p.strength) for p in images] == [
        (prompt, seed, strength) for prompt in PROMPTS for seed in (1, 0) for strength in (0.0, 0.5, 1.0)
    ]
    assert done == [4, 8, 12]
    assert [column.strength for column in make_columns(None, [0.5])] == [0.0]
    settings = resolve_settings(base.info, SampleSettings())
    assert (settings.width, settings.height) == (base.info.resolution,) * 2
    assert images[0].settings == replace(settings, steps=3, width=64, height=64)
    assert settings.guidance == base.info.defaults.guidance
    assert settings.scheduler == base.info.scheduler_config["_class_name"]


def test_strengths_share_a_batch(base: StableDiffusion, adapter: Adapter) -> None:
    """R-10, R-37: the images of separate runs, within 2 of 255; those of the base to the bit."""
    strengths = [0.25, 0.5, 1.0]
    done: list[int] = []
    together = generate(
        base, adapter, PROMPTS[:1], [0], strengths, QUICK, progress=lambda n, _: done.append(n)
    )
    assert done == [1, 4]
    for number, strength in enumerate(strengths, 1):
        plain, alone = generate(base, adapter, PROMPTS[:1], [0], [strength], QUICK)
        assert np.array_equal(pixels([plain]), pixels(together[:1]))
        assert np.abs(pixels([alone]) - pixels(together[number : number + 1])).max() <= 2


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_siblings_share_a_batch(base: StableDiffusion, adapter: Adapter, kind: str) -> None:
    """R-10: adapters on one parent, each with its own strength, within 2 of 255; a DoRA is drawn alone."""
    stacks = []
    for seed in (1, 2):
        ranks = dict.fromkeys(adapter.modules, 2)
        sibling = draw_adapter(base.denoiser, ranks, dict.fromkeys(ranks, 1.0), seed=seed, kind=kind).to()
        for module in sibling.modules.values():
            generator = torch.Generator().manual_seed(seed)
            module.up = torch.randn(module.up.shape, generator=generator) * 0.3
        stacks.append(((adapter, 0.5), (sibling, 0.6 + 0.2 * seed)))
    columns = [Column(stack, 1.0, f"{number}") for number, stack in enumerate(stacks)]
    done: list[int] = []
    together = sampling.generate(base, columns, PROMPTS[:1], [0], QUICK, progress=lambda n, _: done.append(n))
    assert done == ([2] if kind == "lora" else [1, 2])
    for column, image in zip(columns, together, strict=True):
        (alone,) = sampling.generate(base, [column], PROMPTS[:1], [0], QUICK)
        assert np.abs(pixels([alone]) - pixels([image])).max() <= 2


def test_nothing_is_left_behind(info: BaseInfo, adapter: Adapter) -> None:
    """R-04, R-10: random states, train mode of each module, mounted stacks, gradients."""
    base = load_base(info, dtype=torch.float32, device="cpu")
    names = match_targets(base.denoiser, ["*.attn2.to_v"])
    trained = create_adapter(base.denoiser, names, 2, 2, seed=0, family="sd1")
    mount(base.denoiser, [(trained, 1.0)])
    for parameter in trained.parameters():
        parameter.grad = torch.ones_like(parameter)
    base.denoiser.train()
    base.denoiser.mid_block.eval()
    modes = [module.training for module in base.denoiser.modules()]
    stacks = {name: layer.stack for name, layer in lora_layers(base.denoiser).items()}
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()

    def draw(*_: int) -> None:
        torch.rand(3)
        random.random()
        np.random.rand()

    generate(base, adapter, PROMPTS[:1], [0], [1.0], replace(QUICK, scheduler="DDPM"), progress=draw)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), states[2], strict=True))
    assert [module.training for module in base.denoiser.modules()] == modes
    after = {name: layer.stack for name, layer in lora_layers(base.denoiser).items()}
    assert list(after) == list(stacks)
    assert all(a is b for name in stacks for a, b in zip(after[name], stacks[name], strict=True))
    assert all(
        parameter.grad is not None and (parameter.grad == 1).all() for parameter in trained.parameters()
    )


def test_state_is_put_back_after_a_failure(info: BaseInfo, adapter: Adapter) -> None:
    """R-18: whatever stops sampling (memory, Ctrl-C) passes on, and training can go on."""
    base = load_base(info, dtype=torch.float32, device="cpu")
    base.denoiser.train()
    state = torch.get_rng_state()

    def stop(*_: int) -> None:
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        generate(base, adapter, PROMPTS[:1], [0], [1.0], QUICK, progress=stop)
    assert base.denoiser.training
    assert not lora_layers(base.denoiser)
    assert torch.equal(torch.get_rng_state(), state)


def test_base_column_hides_what_is_mounted(info: BaseInfo, adapter: Adapter) -> None:
    """R-10: in training the trainable adapter is on the UNet; the base column is the base all the same."""
    base = load_base(info, dtype=torch.float32, device="cpu")
    plain = generate(base, None, PROMPTS[:1], [0], [], QUICK)
    mount(base.denoiser, [(adapter, 1.0)])
    assert lora_layers(base.denoiser)
    assert np.array_equal(pixels(generate(base, None, PROMPTS[:1], [0], [], QUICK)), pixels(plain))


def test_never_fuses(info: BaseInfo, adapter: Adapter) -> None:
    """R-38: base weights and outputs are bit-identical after sampling and unloading."""
    base = load_base(info, dtype=torch.bfloat16, device="cpu")
    weights = {name: tensor.clone() for name, tensor in base.denoiser.state_dict().items()}
    x = torch.randn(1, info.latent_channels, 16, 16)
    condition = base.encode_captions(["a cat"])
    before = base.denoise(x, torch.tensor([500]), condition)
    for _ in range(3):
        generate(base, adapter, PROMPTS[:1], [0], [0.7], QUICK)
    detach(base.denoiser)
    after = base.denoiser.state_dict()
    assert list(after) == list(weights)
    assert all(torch.equal(after[name], tensor) for name, tensor in weights.items())
    assert all(after[name].stride() == tensor.stride() for name, tensor in weights.items())
    assert torch.equal(base.denoise(x, torch.tensor([500]), condition), before)


@pytest.mark.parametrize(
    ("dtype", "targets"),
    [(torch.bfloat16, "attention"), (torch.bfloat16, "*conv_in"), (torch.float16, "attention")],
)
def test_half_precision_bases_sample(info: BaseInfo, dtype: torch.dtype, targets: str) -> None:
    """R-11: an fp32 adapter on a half precision UNet with an fp32 VAE, the first layer included."""
    base = load_base(info, dtype=dtype, device="cpu")
    adapter = create_adapter(
        base.denoiser, match_targets(base.denoiser, [targets]), 2, 2, seed=0, family="sd1"
    )
    images = generate(base, adapter, PROMPTS[:1], [0], [1.0], QUICK)
    reference = generate(
        load_base(info, dtype=torch.float32, device="cpu"), None, PROMPTS[:1], [0], [], QUICK
    )
    assert np.abs(pixels(images[1:]) - pixels(reference)).mean() < 6


def test_states_encoded_before_give_the_same_images(base: StableDiffusion, adapter: Adapter) -> None:
    """R-10: in training the text encoder has left; its states, negative prompt included, are handed over."""
    settings = replace(QUICK, negative_prompt="a cat")
    text = encode_prompts(base, PROMPTS, settings)
    assert set(text) == {*PROMPTS, "a cat"}
    assert text["a cat"].hidden.shape == (
        base.info.text_length,
        base.info.denoiser_config["cross_attention_dim"],
    )
    before = generate(base, adapter, PROMPTS, [0], [1.0], settings)
    blind = replace(base, tokenizers=())
    assert np.array_equal(
        pixels(generate(blind, adapter, PROMPTS, [0], [1.0], settings, text=text)), pixels(before)
    )


def test_withheld_images_are_blank_and_say_so(base: StableDiffusion) -> None:
    """R-47: what a safety checker keeps back is marked, never a black square."""
    careful = replace(base, safety_checker=lambda images: [number == 1 for number in range(len(images))])
    images = generate(careful, None, PROMPTS, [0], [], QUICK)
    assert [image.blank for image in images] == ["", FLAGGED]
    assert images[1].image.getcolors() == [(images[1].image.width * images[1].image.height, (230,) * 3)]


def test_images_that_are_not_finite_are_blank_and_say_so(base: StableDiffusion, adapter: Adapter) -> None:
    """R-22: a strength that overflows is no black image without a word."""
    images = generate(base, adapter, PROMPTS[:1], [0], [1e30], QUICK)
    assert [image.blank for image in images] == ["", NOT_FINITE]
    assert images[1].image.getcolors() == [(64 * 64, (230,) * 3)]


@pytest.mark.parametrize(
    ("scheduler", "steps", "denoise"),
    [(None, 5, 0.6), ("EulerAncestralDiscreteScheduler", 4, 0.5), ("HeunDiscreteScheduler", 3, 1.0)],
)  # fmt: skip
def test_an_image_to_start_from_equals_stock_diffusers(
    base: StableDiffusion, stock: Any, tmp_path: Path, scheduler: str | None, steps: int, denoise: float
) -> None:
    """R-10: as `StableDiffusionImg2ImgPipeline` draws, in the aspect ratio of the image."""
    noise = np.random.default_rng(0).integers(0, 255, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((512, 384)).save(tmp_path / "a.png")
    start, size = StartImage.open(tmp_path / "a.png", denoise, 112, base.info.min_step)
    assert size == (128, 96)
    plain = SampleSettings(steps, 5.0, scheduler, width=size[0], height=size[1], start=start)
    settings = resolve_settings(base.info, plain)
    config, kind = stock.scheduler.config, getattr(diffusers, settings.scheduler or "")
    with quiet():
        image_to_image = diffusers.StableDiffusionImg2ImgPipeline(
            **{**stock.components, "scheduler": kind.from_config(config)}, requires_safety_checker=False
        )
    image_to_image.set_progress_bar_config(disable=True)
    image = Image.open(tmp_path / "a.png").resize(size, Image.Resampling.LANCZOS)
    torch.manual_seed(3)
    expected = image_to_image(
        PROMPTS, [image] * 2, strength=denoise, num_inference_steps=steps, guidance_scale=5.0,
        negative_prompt=[""] * 2, generator=[torch.Generator().manual_seed(seed) for seed in (3, 3)],
    ).images  # fmt: skip
    assert_same_image(pixels(generate(base, None, PROMPTS, [3], [], settings)), pixels(expected))
