"""What to sample and how, and the images of it: prompts × strengths × seeds into a folder with a grid."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sdlora.config import RunConfig, SampleSection
from sdlora.models.base import Base, Condition
from sdlora.models.dtypes import has_bf16
from sdlora.models.info import BaseInfo
from sdlora.sampling.generate import Column, generate_columns
from sdlora.sampling.grid import make_grid
from sdlora.sampling.images import SampledImage, SampleSettings, save_images


@dataclass(frozen=True)
class SampleRequest:
    """What to sample.

    Args:
        prompts: With placeholders already replaced.
        seeds: One image for each prompt and seed.
        strengths: Columns beside the base.
        settings: How.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    strengths: tuple[float, ...]
    settings: SampleSettings


def make_request(sample: SampleSection, info: BaseInfo, size: tuple[int, int]) -> SampleRequest:
    """What the settings ask for; the guidance is the base's own unless they say one.

    Args:
        sample: The settings.
        info: The base.
        size: Width and height in pixels.
    """
    return SampleRequest(
        tuple(sample.prompts),
        tuple(sample.seeds),
        tuple(sample.strengths),
        SampleSettings(
            steps=sample.steps,
            guidance=info.guidance if sample.guidance is None else sample.guidance,
            scheduler=sample.scheduler,
            negative_prompt=sample.negative_prompt,
            width=size[0],
            height=size[1],
            batch_size=sample.batch_size,
            safety_checker=sample.safety_checker,
        ),
    )


def request_of_run(config: RunConfig, info: BaseInfo) -> SampleRequest:
    """What a run's resolved configuration asks for, at its training resolution."""
    side = config.data.resolution or info.resolution
    return make_request(config.sample, info, (side, side))


def choose_device() -> torch.device:
    """The accelerator that torch finds, else the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


def choose_dtype(device: torch.device) -> torch.dtype:
    """bf16 on a GPU that has it, else fp32."""
    return torch.bfloat16 if has_bf16(device) else torch.float32


def sample_to_folder(
    base: Base,
    columns: Sequence[Column],
    request: SampleRequest,
    folder: Path,
    *,
    name: str | None = None,
    title: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Makes the images and their grid.

    Args:
        base: The base, with or without adapters mounted; they stay as they are.
        columns: What to show.
        request: What to sample; its strengths are those of the columns.
        folder: Gets `grid.png` and the single images.
        name: What the adapter is called in the images' metadata.
        title: Written above the grid.
        progress: Told (finished, total) images.

    Returns:
        The grid's path.
    """
    images = make_pictures(base, columns, request, progress=progress)
    return write_images(folder, images, base=base.info.name, adapter=name, title=title)


def write_images(
    folder: Path, images: Sequence[SampledImage], *, base: str, adapter: str | None, title: str
) -> Path:
    """Writes the single images and their grid; gives the grid's path."""
    metadata = {"base": base, "adapter": adapter}
    return save_images(folder, images, make_grid(images, title=title), metadata)


def make_pictures(
    base: Base,
    columns: Sequence[Column],
    request: SampleRequest,
    *,
    text: Mapping[str, Condition] | None = None,
    progress: Callable[[int, int], None] | None = None,
    share: tuple[int, int] = (0, 1),
) -> list[SampledImage]:
    """Makes what is asked for, or a share of it; see `generate_columns`."""
    total = len(request.prompts) * len(request.seeds) * len(columns)
    return generate_columns(
        base,
        columns,
        request.prompts,
        request.seeds,
        request.settings,
        text=text,
        progress=None if progress is None else lambda done: progress(done, total),
        share=share,
    )
