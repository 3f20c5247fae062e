"""Images for prompts, seeds and strengths, made by the stock diffusers pipeline around our denoiser.

B batch, C channels, h w latent size.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from sdlora.lora.adapter import Adapter
from sdlora.lora.attach import mounted
from sdlora.models.base import Base, Condition, quiet
from sdlora.sampling.images import (
    FLAGGED,
    NOT_FINITE,
    SampledImage,
    SampleSettings,
    check_prompts,
    make_scheduler,
    resolve_settings,
)
from sdlora.tree.lineage import Stack


@contextmanager
def preserve_state(*models: nn.Module) -> Iterator[None]:
    """Puts models in eval mode and gives them, and all random generators, back as they were."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    python, numpy = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    try:
        for model in models:
            model.eval()
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        if mps is not None:
            torch.mps.set_rng_state(mps)
        for module, training in modes:
            module.training = training


LATENT_UNIT_PX = 8
EMPTY = "#e6e6e6"


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the grid: the same noise and prompt in every column."""

    prompt: str
    seed: int


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a grid; without a stack, the base.

    Args:
        stack: What is mounted for it: (adapter, strength), the lowest first.
        strength: Of the adapter that is shown.
        adapter: What to call that one, in a grid that compares several.
    """

    stack: Stack = ()
    strength: float = 0.0
    adapter: str = ""

    @property
    def changes_text(self) -> bool:
        """Whether a text encoder says something else here than in the base."""
        return any(adapter.changes_text and strength for adapter, strength in self.stack)


def make_columns(
    adapter: Adapter | None,
    strengths: Sequence[float],
    ancestors: Stack = (),
    names: tuple[str, str] = ("parent", "child"),
) -> list[Column]:
    """The base, what the adapter was trained on top of if that is more, then each other strength once.

    Args:
        adapter: The adapter to show; None shows the base alone.
        strengths: Of the adapter; its ancestors keep theirs.
        ancestors: Mounted below it: (adapter, strength), the root first.
        names: Of the last ancestor and of the adapter, where both are shown.
    """
    if adapter is None:
        return [Column()]
    parent, name = names if ancestors else ("", "")
    columns = [Column(), Column(ancestors, 1.0, parent)] if ancestors else [Column()]
    shown = [float(strength) for strength in dict.fromkeys(strengths) if strength]
    return columns + [Column((*ancestors, (adapter, strength)), strength, name) for strength in shown]


@torch.no_grad()
def generate(
    base: Base,
    columns: Sequence[Column],
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: SampleSettings = SampleSettings(),  # noqa: B008
    *,
    text: Mapping[str, Condition] | None = None,
    progress: Callable[[int, int], object] | None = None,
    share: tuple[int, int] = (0, 1),
) -> list[SampledImage]:
    """Makes a sample for each prompt, seed and column.

    Adapters are mounted, never fused (R-38). Afterwards the base, what was mounted on it, gradients,
    train mode and all random states are as they were (R-10).

    Args:
        base: The base; what is mounted on it is put aside meanwhile.
        columns: What to mount.
        prompts: With `{trigger}` already replaced.
        seeds: A seed gives the same noise with every prompt and column.
        settings: How.
        text: Prompt to the base's text states, from `encode_prompts`; what is missing is encoded here, and
            all of it for each column that changes a text encoder.
        progress: Called with (finished, total) images.
        share: (k, n) makes every n-th batch, from the k-th on. Batches are the same whoever makes them; the
            samples of the others are black, so that the sum of all shares is the whole.

    Returns:
        Row by row of the grid: prompt, then seed, then column.

    Raises:
        ConfigError: If a prompt, the size or the scheduler cannot be used.
    """
    settings = resolve_settings(base.info, settings)
    check_prompts(prompts)
    rows = [Row(prompt, seed) for prompt in prompts for seed in seeds]
    samples: list[list[SampledImage]] = [[] for _ in columns]
    turns = itertools.cycle(range(share[1]))
    known = dict(text or {})
    parts = base.components
    with preserve_state(*parts.values()), torch.autocast(base.device.type, enabled=False):
        pipeline = base.make_pipeline(make_scheduler(base.info, settings.scheduler))
        for column, made in zip(columns, samples, strict=True):
            with mounted(parts, column.stack):
                if column.changes_text:
                    states = encode_prompts(base, prompts, settings)
                else:
                    states = known = encode_prompts(base, prompts, settings, known)
                for batch in _batches(rows, settings.batch_size):
                    if next(turns) == share[0]:
                        latents = _denoise(base, pipeline, batch, states, settings)
                        shown = _show(base, pipeline, latents, settings)
                    else:
                        shown = _leave_out(batch, settings)
                    made += _label(batch, *shown, column, settings)
                    if progress is not None:
                        progress(sum(map(len, samples)), len(rows) * len(columns))
    return [sample for row in zip(*samples, strict=True) for sample in row]


def _label(
    batch: Sequence[Row],
    images: Sequence[Image.Image],
    blanks: Sequence[str],
    column: Column,
    settings: SampleSettings,
) -> list[SampledImage]:
    return [
        SampledImage(image, row.prompt, row.seed, column.strength, blank, settings, column.adapter)
        for row, image, blank in zip(batch, images, blanks, strict=True)
    ]


@torch.no_grad()
def encode_prompts(
    base: Base, prompts: Sequence[str], settings: SampleSettings, known: Mapping[str, Condition] | None = None
) -> dict[str, Condition]:
    """Text states of prompts and of the negative prompt, for `generate` to use later.

    Args:
        known: States encoded before; they are part of the answer.
    """
    states = dict(known or {})
    for prompt in (*prompts, settings.negative_prompt):
        if prompt not in states:
            states[prompt] = base.encode_captions([prompt])[0]
    return states


def _batches(rows: Sequence[Row], size: int) -> Iterator[Sequence[Row]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _denoise(
    base: Base, pipeline: Any, batch: Sequence[Row], states: Mapping[str, Condition], settings: SampleSettings
) -> Tensor:
    """Latents (B, C, h, w) of one batch."""
    assert settings.guidance is not None
    info, device, dtype = base.info, base.device, base.dtype
    width, height = settings.width // info.vae_factor, settings.height // info.vae_factor
    generators = [torch.Generator().manual_seed(row.seed) for row in batch]
    shape = (1, info.latent_channels, height, width)
    noise = torch.cat([torch.randn(shape, generator=generator, dtype=dtype) for generator in generators])
    texts = {"prompt_embeds": [states[row.prompt] for row in batch]}
    if settings.guidance > 1:
        texts["negative_prompt_embeds"] = [states[settings.negative_prompt]] * len(batch)
    # A few schedulers draw from the ambient generator.
    torch.manual_seed(batch[0].seed)
    # Without a VAE the pipeline counts 8 pixels for each latent; SDXL's must be told the true size.
    size = (settings.height, settings.width)
    with quiet():
        latents: Tensor = pipeline(
            **_text_arguments(texts, device, dtype),
            **({"original_size": size, "target_size": size} if info.has_time_ids else {}),
            latents=noise.to(device),
            generator=generators,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            width=width * LATENT_UNIT_PX,
            height=height * LATENT_UNIT_PX,
            output_type="latent",
            return_dict=False,
        )[0]
    return latents


def _text_arguments(
    texts: Mapping[str, Sequence[Condition]], device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Text states as the pipeline's arguments; those of SDXL come in pairs."""
    arguments = {}
    for name, conditions in texts.items():
        condition = Condition.stack(conditions).to(device, dtype)
        arguments[name] = condition.hidden
        if condition.pooled is not None:
            arguments[name.replace("prompt", "pooled_prompt")] = condition.pooled
    return arguments


def _leave_out(batch: Sequence[Row], settings: SampleSettings) -> tuple[list[Image.Image], list[str]]:
    """Black in place of what another process makes."""
    return [Image.new("RGB", (settings.width, settings.height)) for _ in batch], [""] * len(batch)


def _show(
    base: Base, pipeline: Any, latents: Tensor, settings: SampleSettings
) -> tuple[list[Image.Image], list[str]]:
    """Images, and why some of them are blank."""
    pixels = base.decode_latents(latents)
    images = pipeline.image_processor.postprocess(pixels.nan_to_num(), output_type="pil")
    withhold = base.safety_checker if settings.safety_checker else None
    withheld = withhold(images) if withhold is not None else [False] * len(images)
    blanks = [
        FLAGGED if hidden else "" if bool(own.isfinite().all()) else NOT_FINITE
        for own, hidden in zip(pixels, withheld, strict=True)
    ]
    shown = [
        Image.new("RGB", image.size, EMPTY) if blank else image
        for image, blank in zip(images, blanks, strict=True)
    ]
    return shown, blanks
