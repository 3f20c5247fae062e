"""Grids during training: the same code path as `sdlora sample`, on the adapter as saved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache
from PIL import Image

from sdlora.formats.files import load_adapter
from sdlora.runs import RunFolder
from sdlora.sampling.generate import generate, make_columns
from sdlora.sampling.grid import save_grid
from sdlora.sampling.images import BLANKS, SampledImage, SampleSettings
from sdlora.sampling.targets import find_run_targets
from sdlora.training.device import as_out_of_memory
from sdlora.training.distributed import all_reduce_count, all_reduce_sum, barrier
from sdlora.training.plan import RunPlan
from sdlora.training.prepare import Prepared


class SamplingStopped(Exception):
    """Raised by `progress` to skip a grid, which may take longer than a scheduler waits after a signal."""


def sample_step(
    run: RunFolder,
    plan: RunPlan,
    prepared: Prepared,
    accelerator: Accelerator,
    step: int,
    *,
    progress: Callable[[int, int], None],
) -> Path | None:
    """Samples the adapter saved at a step, each process a share.

    Columns without that adapter are the same in each grid of a run: only the first grid draws them.
    `progress` gets the number of images done and of all, and may raise `SamplingStopped`.

    Returns the path of the grid, on the main process; None on the others, and where one of them was stopped.
    Raises OutOfMemoryError on all processes if one of them ran out of memory.
    """
    # The main process has just written the adapter that all now read.
    barrier(accelerator)
    sample, side = plan.config.sample, plan.config.data.resolution or plan.info.resolution
    names = (plan.parents[-1].ancestor.name if plan.parents else "", run.name)
    adapter = load_adapter(run.step_adapter(step))
    columns = make_columns(adapter, sample.strengths, prepared.parents, names)
    shown = [column for column in columns if any(one is adapter for one, _ in column.stack)]
    images: list[SampledImage] | None = None
    stopped = False
    try:
        with suppress(torch.OutOfMemoryError), as_out_of_memory():
            images = generate(
                prepared.base,
                shown if prepared.fixed_images else columns,
                sample.prompts,
                sample.seeds,
                SampleSettings.of(sample, (side, side)),
                text=prepared.prompt_states,
                progress=progress,
                share=(accelerator.process_index, accelerator.num_processes),
            )
    except SamplingStopped:
        stopped = True
    if all_reduce_count(accelerator, images is None):
        if all_reduce_count(accelerator, stopped):
            return None
        clear_device_cache()
        raise torch.OutOfMemoryError("out of memory while sampling")
    assert images is not None
    images = _add_fixed(_add_shares(accelerator, images), prepared.fixed_images, len(columns), len(shown))
    if not accelerator.is_main_process:
        return None
    folder, title = run.sample_folder(step), f"{run.name}, step {step}"
    # Found as `sdlora sample RUN` finds them, so that both draw the same grid.
    targets = find_run_targets(plan.config, sample.prompts)
    name = prepared.base.info.name
    return save_grid(folder, images, base=name, adapter=run.name, title=title, targets=targets)


def _add_fixed(
    images: list[SampledImage], fixed: list[SampledImage], num_columns: int, num_shown: int
) -> list[SampledImage]:
    """Rows of images with those of the fixed columns, which the first grid leaves in `fixed`."""
    num_fixed = num_columns - num_shown
    if not fixed:
        fixed += [image for number, image in enumerate(images) if number % num_columns < num_fixed]
        return images
    starts = range(0, len(fixed), num_fixed)
    rows = [(fixed[at : at + num_fixed], at // num_fixed * num_shown) for at in starts]
    return [image for own, at in rows for image in (*own, *images[at : at + num_shown])]


def _add_shares(accelerator: Accelerator, images: Sequence[SampledImage]) -> list[SampledImage]:
    """Joins the images that each process made; those of other processes are black."""
    if accelerator.num_processes == 1:
        return list(images)
    pixels = torch.from_numpy(np.stack([np.asarray(image.image) for image in images]))
    blanks = torch.tensor([BLANKS.index(image.blank) for image in images], dtype=torch.uint8)
    pixels = all_reduce_sum(accelerator, pixels)
    blanks = all_reduce_sum(accelerator, blanks)
    return [
        replace(image, image=Image.fromarray(own.numpy()), blank=BLANKS[blank])
        for image, own, blank in zip(images, pixels, blanks.tolist(), strict=True)
    ]
