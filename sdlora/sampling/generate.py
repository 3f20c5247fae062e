"""Images for prompts, seeds and strengths, made by the stock diffusers pipeline around our denoiser.

A row of a grid is (prompt, seed). B batch, C channels, h w latent size.
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
from sdlora.lora.kinds import Scale
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

# Without a VAE, the pipeline takes a latent for 8 pixels.
LATENT_UNIT_PX = 8
EMPTY = "#e6e6e6"


@contextmanager
def preserve_state(*models: nn.Module) -> Iterator[None]:
    """Puts models in eval mode; restores their modes and the states of all random generators afterwards."""
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


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a grid: adapters to mount, or none for the base, with their strengths, the root first.

    `strength` and `adapter`, a name in grids that compare several, are those of the adapter that is shown.
    """

    stack: Stack = ()
    strength: float = 0.0
    adapter: str = ""

    @property
    def changes_text(self) -> bool:
        """Whether text states differ from the base's."""
        return any(adapter.changes_text and strength for adapter, strength in self.stack)


def make_columns(
    adapter: Adapter | None,
    strengths: Sequence[float],
    ancestors: Stack = (),
    names: tuple[str, str] = ("parent", "child"),
) -> list[Column]:
    """The base, the ancestors if there are any, and then the adapter at each other strength once.

    Ancestors are (adapter, strength), the root first, and keep their strengths. `names` are those of the last
    ancestor and of the adapter, where both are shown.
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
        base: The base, whose mounted adapters are put aside meanwhile.
        columns: Adapters to mount.
        prompts: Prompts in which `{trigger}` is already replaced.
        seeds: A seed gives the same noise with every prompt and column.
        settings: Settings of the images.
        text: Text states from `encode_prompts`, for the columns that do not change a text encoder.
        progress: Called with (finished, total) images.
        share: (k, n) makes every n-th batch, from the k-th on; samples of other batches are black, so that
            the sum of all shares is the whole.

    Returns:
        Row by row of the grid: prompt, then seed, then column.

    Raises:
        ConfigError: If a prompt, the size or the scheduler cannot be used.
    """
    settings = resolve_settings(base.info, settings)
    check_prompts(prompts)
    rows = list(itertools.product(prompts, seeds))
    batches = _make_batches(columns, len(rows), settings.batch_size)
    samples: list[list[SampledImage]] = [[] for _ in columns]
    with preserve_state(*base.components.values()), torch.autocast(base.device.type, enabled=False):
        states = _encode_columns(base, columns, prompts, settings, text)
        pipeline = base.make_pipeline(make_scheduler(base.info, settings.scheduler))
        for turn, batch in enumerate(batches):
            if turn % share[1] == share[0]:
                stack = _stack_of([columns[column] for column, _ in batch], base.device)
                own = [states[column] for column, _ in batch]
                with mounted(base.components, stack):
                    shown = _draw(base, pipeline, [rows[row] for _, row in batch], own, settings)
            else:
                shown = [(Image.new("RGB", (settings.width, settings.height)), "")] * len(batch)
            for (number, row), (image, blank) in zip(batch, shown, strict=True):
                column, made = columns[number], samples[number]
                made.append(SampledImage(image, *rows[row], column.strength, blank, settings, column.adapter))
            if progress is not None:
                progress(sum(map(len, samples)), len(rows) * len(columns))
    return [sample for row in zip(*samples, strict=True) for sample in row]


def _make_batches(columns: Sequence[Column], num_rows: int, size: int) -> list[list[tuple[int, int]]]:
    """The cells of a grid, (column, row), that are drawn at once.

    Columns with equally many adapters share batches: strengths of one adapter, or siblings in a tree. The
    base, and ancestors alone, do not: a run draws them once. A DoRA is not the base at strength 0.
    """
    groups: dict[Any, list[tuple[int, int]]] = {}
    for number, column in enumerate(columns):
        adapters = [adapter for adapter, _ in column.stack]
        can_mix = all(module.is_additive for one in adapters for module in one.modules.values())
        key = len(adapters) if can_mix else tuple(map(id, adapters))
        groups.setdefault(key, []).extend((number, row) for row in range(num_rows))
    return [cells[at : at + size] for cells in groups.values() for at in range(0, len(cells), size)]


def _stack_of(columns: Sequence[Column], device: torch.device) -> list[tuple[Adapter, Scale]]:
    """The adapters of all samples of a batch, with a strength for each sample where they differ."""
    strengths = [{id(adapter): strength for adapter, strength in column.stack} for column in columns]
    adapters = {id(adapter): adapter for column in columns for adapter, _ in column.stack}
    stack: list[tuple[Adapter, Scale]] = []
    for key, adapter in adapters.items():
        own = [known.get(key, 0.0) for known in strengths]
        stack.append((adapter, own[0] if len(set(own)) == 1 else torch.tensor(own, device=device)))
    return stack


def _encode_columns(
    base: Base,
    columns: Sequence[Column],
    prompts: Sequence[str],
    settings: SampleSettings,
    known: Mapping[str, Condition] | None,
) -> list[Mapping[str, Condition]]:
    """Text states for each column; `known` are the base's."""
    states: list[Mapping[str, Condition]] = []
    for column in columns:
        with mounted(base.components, column.stack):
            own = encode_prompts(base, prompts, settings, None if column.changes_text else known)
        known = known if column.changes_text else own
        states.append(own)
    return states


@torch.no_grad()
def encode_prompts(
    base: Base, prompts: Sequence[str], settings: SampleSettings, known: Mapping[str, Condition] | None = None
) -> dict[str, Condition]:
    """Text states of prompts and of the negative prompt; those that are known are not encoded again."""
    states = dict(known or {})
    for prompt in (*prompts, settings.negative_prompt):
        if prompt not in states:
            states[prompt] = base.encode_captions([prompt])[0]
    return states


def _denoise(
    base: Base,
    pipeline: Any,
    batch: Sequence[tuple[str, int]],
    states: Sequence[Mapping[str, Condition]],
    settings: SampleSettings,
) -> Tensor:
    """Latents (B, C, h, w) of one batch."""
    assert settings.guidance is not None
    info, size = base.info, (settings.height, settings.width)
    height, width = (side // info.vae_factor for side in size)
    generators = [torch.Generator().manual_seed(seed) for _, seed in batch]
    shape = (1, info.latent_channels, height, width)
    noise = torch.cat([torch.randn(shape, generator=generator, dtype=base.dtype) for generator in generators])
    arguments = _text_arguments(base, [own[prompt] for own, (prompt, _) in zip(states, batch, strict=True)])
    if settings.guidance > 1:
        negative = [own[settings.negative_prompt] for own in states]
        arguments |= _text_arguments(base, negative, "negative_")
    if info.has_time_ids:
        arguments |= {"original_size": size, "target_size": size}
    # A few schedulers draw from the ambient generator.
    torch.manual_seed(batch[0][1])
    with quiet():
        latents: Tensor = pipeline(
            **arguments,
            latents=noise.to(base.device),
            generator=generators,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            width=width * LATENT_UNIT_PX,
            height=height * LATENT_UNIT_PX,
            output_type="latent",
            return_dict=False,
        )[0]
    return latents


def _text_arguments(base: Base, conditions: Sequence[Condition], prefix: str = "") -> dict[str, Any]:
    """Text states as the pipeline's arguments; SDXL also takes the pooled ones."""
    condition = Condition.stack(conditions).to(base.device, base.dtype)
    pooled = {} if condition.pooled is None else {f"{prefix}pooled_prompt_embeds": condition.pooled}
    return {f"{prefix}prompt_embeds": condition.hidden, **pooled}


def _draw(
    base: Base,
    pipeline: Any,
    batch: Sequence[tuple[str, int]],
    states: Sequence[Mapping[str, Condition]],
    settings: SampleSettings,
) -> list[tuple[Image.Image, str]]:
    """Images of one batch, each with the reason if it is left blank."""
    pixels = base.decode_latents(_denoise(base, pipeline, batch, states, settings))
    images = pipeline.image_processor.postprocess(pixels.nan_to_num(), output_type="pil")
    check = base.safety_checker if settings.safety_checker else None
    flags = check(images) if check is not None else [False] * len(images)
    shown = []
    for image, own, is_flagged in zip(images, pixels, flags, strict=True):
        blank = FLAGGED if is_flagged else "" if bool(own.isfinite().all()) else NOT_FINITE
        shown.append((Image.new("RGB", image.size, EMPTY) if blank else image, blank))
    return shown
