"""Images for prompts, seeds and strengths, made by the stock diffusers pipeline around our denoiser.

A row of a grid is (prompt, seed). B batch, C channels, h w latent size.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from sdlora.data.images import load_image
from sdlora.data.tensors import image_to_tensor
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
Posterior: TypeAlias = tuple[Tensor, Tensor]


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

    `strength` and `adapter`, a name in grids that compare several, are those of the adapter that is shown;
    `trigger` is its own in prompts with `{trigger}`, if it is not the grid's.
    """

    stack: Stack = ()
    strength: float = 0.0
    adapter: str = ""
    trigger: str | None = None

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


@dataclass(frozen=True, slots=True)
class Cell:
    """One image to draw; in its prompt, `{trigger}` is already replaced."""

    column: Column
    prompt: str
    seed: int
    settings: SampleSettings


class Store(Protocol):
    """Images that were drawn before; settings of a cell are resolved."""

    def get(self, base: Base, cell: Cell) -> SampledImage | None: ...

    def put(self, base: Base, cell: Cell, image: SampledImage) -> None: ...


def generate(
    base: Base,
    columns: Sequence[Column],
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: SampleSettings = SampleSettings(),  # noqa: B008
    *,
    text: Mapping[str, Condition] | None = None,
    store: Store | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> list[SampledImage]:
    """Makes a sample for each prompt, seed and column, in this order; the rest is as for `draw`.

    A seed gives the same noise with every prompt and column.
    """
    check_prompts(prompts)
    cells = make_cells(columns, prompts, seeds, settings)
    return draw(base, cells, text=text, store=store, progress=progress)


def make_cells(
    columns: Sequence[Column], prompts: Sequence[str], seeds: Sequence[int], settings: SampleSettings
) -> list[Cell]:
    """The cells of a grid, row by row."""
    rows = itertools.product(prompts, seeds)
    return [Cell(column, prompt, seed, settings) for prompt, seed in rows for column in columns]


@torch.no_grad()
def draw(
    base: Base,
    cells: Sequence[Cell],
    *,
    text: Mapping[str, Condition] | None = None,
    store: Store | None = None,
    progress: Callable[[int, int], object] | None = None,
    share: tuple[int, int] = (0, 1),
) -> list[SampledImage]:
    """Makes the image of each cell, but for those that the store has.

    Adapters are mounted, never fused. Afterwards the base, what was mounted on it, gradients,
    train mode and all random states are as they were.

    Args:
        base: The base, whose mounted adapters are put aside meanwhile.
        cells: In the order of the result.
        text: Text states from `encode_prompts`, for the columns that do not change a text encoder.
        store: Gets each new image as soon as it is finished.
        progress: Called with (finished, total) images.
        share: (k, n) makes every n-th batch, from the k-th on; samples of other batches are black, so that
            the sum of all shares is the whole.

    Raises:
        ConfigError: If a prompt, the size or the scheduler cannot be used.
    """
    resolved = {one: resolve_settings(base.info, one) for one in {cell.settings for cell in cells}}
    cells = [replace(cell, settings=resolved[cell.settings]) for cell in cells]
    if cells:
        check_prompts(list(dict.fromkeys(cell.prompt for cell in cells)))
    known = {number: store.get(base, cell) for number, cell in enumerate(cells)} if store else {}
    images = {number: image for number, image in known.items() if image is not None}
    left = [number for number in range(len(cells)) if number not in images]
    with preserve_state(*base.components.values()), torch.autocast(base.device.type, enabled=False):
        posteriors = {one: _encode_start(base, one) for one in {cells[number].settings for number in left}}
        states = _encode_columns(base, [cells[number] for number in left], text)
        for turn, batch in enumerate(_make_batches(cells, left)):
            own = [cells[number] for number in batch]
            if turn % share[1] == share[0]:
                with mounted(base.components, _stack_of([cell.column for cell in own], base.device)):
                    texts = [states[id(cell.column)] for cell in own]
                    shown = _draw(base, own, texts, posteriors[own[0].settings])
            else:
                size = own[0].settings.width, own[0].settings.height
                shown = [(Image.new("RGB", size), "")] * len(batch)
            for number, cell, (pixels, blank) in zip(batch, own, shown, strict=True):
                images[number] = made = make_sample(cell, pixels, blank)
                if store is not None:
                    store.put(base, cell, made)
            if progress is not None:
                progress(len(images), len(cells))
    return [images[number] for number in range(len(cells))]


def make_sample(cell: Cell, image: Image.Image, blank: str = "") -> SampledImage:
    column = cell.column
    strength, name = column.strength, column.adapter
    return SampledImage(image, cell.prompt, cell.seed, strength, blank, cell.settings, name)


def _make_batches(cells: Sequence[Cell], left: Sequence[int]) -> list[list[int]]:
    """The numbers of the cells that are drawn at once, column by column.

    Columns with equally many adapters share batches: strengths of one adapter, or siblings in a tree. The
    base, and ancestors alone, do not: a run draws them once. A DoRA is not the base at strength 0.
    """
    order = {key: place for place, key in enumerate(dict.fromkeys(id(cell.column) for cell in cells))}
    groups: dict[Any, list[int]] = {}
    for number in sorted(left, key=lambda number: order[id(cells[number].column)]):
        column, settings = cells[number].column, cells[number].settings
        adapters = [adapter for adapter, _ in column.stack]
        can_mix = all(module.is_additive for one in adapters for module in one.modules.values())
        key = len(adapters) if can_mix else tuple(map(id, adapters))
        groups.setdefault((settings, key), []).append(number)
    return [
        numbers[at : at + settings.batch_size]
        for (settings, _), numbers in groups.items()
        for at in range(0, len(numbers), settings.batch_size)
    ]


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
    base: Base, cells: Sequence[Cell], known: Mapping[str, Condition] | None
) -> dict[int, Mapping[str, Condition]]:
    """Text states by the id of a column; `known` are the base's."""
    states: dict[int, Mapping[str, Condition]] = {}
    for column in {id(cell.column): cell.column for cell in cells}.values():
        own = [cell for cell in cells if cell.column is column]
        prompts = [prompt for cell in own for prompt in (cell.prompt, cell.settings.negative_prompt)]
        with mounted(base.components, column.stack):
            found = encode_prompts(base, prompts, own[0].settings, None if column.changes_text else known)
        known = known if column.changes_text else found
        states[id(column)] = found
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


def _encode_start(base: Base, settings: SampleSettings) -> Posterior | None:
    """Mean and standard deviation (1, C, h, w) of the latents of the image that sampling starts from."""
    if settings.start is None:
        return None
    size = settings.width, settings.height
    image = ImageOps.fit(load_image(settings.start.path), size, Image.Resampling.LANCZOS)
    return base.encode_images(image_to_tensor(image)[None])


def _denoise(
    base: Base,
    pipeline: Any,
    cells: Sequence[Cell],
    states: Sequence[Mapping[str, Condition]],
    posterior: Posterior | None,
) -> Tensor:
    """Latents (B, C, h, w) of one batch."""
    settings = cells[0].settings
    assert settings.guidance is not None
    size = settings.height, settings.width
    generators = [torch.Generator().manual_seed(cell.seed) for cell in cells]
    arguments = _text_arguments(base, [own[cell.prompt] for own, cell in zip(states, cells, strict=True)])
    if settings.guidance > 1:
        negative = [own[settings.negative_prompt] for own in states]
        arguments |= _text_arguments(base, negative, "negative_")
    if base.info.has_time_ids:
        arguments |= {"original_size": size, "target_size": size}
    arguments |= _start_arguments(base, pipeline, settings, generators, posterior)
    # A few schedulers draw from the ambient generator.
    torch.manual_seed(cells[0].seed)
    with quiet():
        latents: Tensor = pipeline(
            **arguments,
            generator=generators,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            output_type="latent",
            return_dict=False,
        )[0]
    return latents


def _start_arguments(
    base: Base,
    pipeline: Any,
    settings: SampleSettings,
    generators: Sequence[torch.Generator],
    posterior: Posterior | None,
) -> dict[str, Any]:
    """What denoising starts from: noise, or the image with the noise of the first step that is run."""
    height, width = (side // base.info.vae_factor for side in (settings.height, settings.width))
    shape = (1, base.info.latent_channels, height, width)

    def draw_noise() -> Tensor:
        drawn = [torch.randn(shape, generator=generator, dtype=base.dtype) for generator in generators]
        return torch.cat(drawn).to(base.device)

    if posterior is None or settings.start is None:
        sides = {"width": width * LATENT_UNIT_PX, "height": height * LATENT_UNIT_PX}
        return {"latents": draw_noise(), **sides}
    # In the order of stock diffusers: a sample of the posterior, and then the noise.
    mean, std = (part.to(base.device, base.dtype) for part in posterior)
    latents, noise = mean + std * draw_noise(), draw_noise()
    add_noise = pipeline.scheduler.add_noise
    # Its own takes latents of 4 channels alone.
    pipeline.prepare_latents = lambda image, timestep, *_, **__: add_noise(latents, noise, timestep)
    # Looked at for its type alone.
    return {"image": torch.zeros(len(generators), 3, 8, 8), "strength": settings.start.denoise}


def _text_arguments(base: Base, conditions: Sequence[Condition], prefix: str = "") -> dict[str, Any]:
    """Text states as the pipeline's arguments; SDXL also takes the pooled ones."""
    condition = Condition.stack(conditions).to(base.device, base.dtype)
    pooled = {} if condition.pooled is None else {f"{prefix}pooled_prompt_embeds": condition.pooled}
    return {f"{prefix}prompt_embeds": condition.hidden, **pooled}


def _draw(
    base: Base,
    cells: Sequence[Cell],
    states: Sequence[Mapping[str, Condition]],
    posterior: Posterior | None,
) -> list[tuple[Image.Image, str]]:
    """Images of one batch, each with the reason if it is left blank."""
    settings = cells[0].settings
    scheduler = make_scheduler(base.info, settings.scheduler)
    pipeline = base.make_pipeline(scheduler, from_image=posterior is not None)
    pixels = base.decode_latents(_denoise(base, pipeline, cells, states, posterior))
    images = pipeline.image_processor.postprocess(pixels.nan_to_num(), output_type="pil")
    check = base.safety_checker if settings.safety_checker else None
    flags = check(images) if check is not None else [False] * len(images)
    shown = []
    for image, own, is_flagged in zip(images, pixels, flags, strict=True):
        blank = FLAGGED if is_flagged else "" if bool(own.isfinite().all()) else NOT_FINITE
        shown.append((Image.new("RGB", image.size, EMPTY) if blank else image, blank))
    return shown
