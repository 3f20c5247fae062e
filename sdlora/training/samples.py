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
from sdlora.lora.adapter import Adapter
from sdlora.models.base import Base
from sdlora.runs import RunFolder
from sdlora.sampling.generate import Cell, draw, make_cells, make_columns
from sdlora.sampling.grid import make_grid
from sdlora.sampling.images import BLANKS, SampledImage, SampleSettings, resolve_settings, save_images
from sdlora.sampling.store import ImageStore
from sdlora.sampling.targets import find_run_targets
from sdlora.training.device import as_out_of_memory
from sdlora.training.distributed import all_reduce_count, all_reduce_sum, barrier
from sdlora.training.plan import RunPlan
from sdlora.training.prepare import Prepared
from sdlora.tree.lineage import path_to_stack


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

    Columns without that adapter are the same in each grid of a run: only the first grid draws them, and that
    of the base only if its images are not in the cache. `progress` gets the number of images done and of all,
    and may raise `SamplingStopped`.

    Returns the path of the grid, on the main process; None on the others, and where one of them was stopped.
    Raises OutOfMemoryError on all processes if one of them ran out of memory.
    """
    # The main process has just written the adapter that all now read.
    barrier(accelerator)
    adapter = load_adapter(run.step_adapter(step))
    cells, known = _make_cells(run, plan, adapter), prepared.fixed_images
    store = None if plan.config.data.cache is False else ImageStore()
    if store and not known:
        known |= _find_images(accelerator, store, prepared.base, cells)
    left = [number for number in range(len(cells)) if number not in known]
    images: list[SampledImage] | None = None
    stopped = False
    try:
        with suppress(torch.OutOfMemoryError), as_out_of_memory():
            images = draw(
                prepared.base,
                [cells[number] for number in left],
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
    made = dict(zip(left, _add_shares(accelerator, images), strict=True))
    fixed = [number for number in left if all(one is not adapter for one, _ in cells[number].column.stack)]
    known |= {number: made[number] for number in fixed}
    if not accelerator.is_main_process:
        return None
    if store:
        for number in fixed:
            store.put(prepared.base, cells[number], made[number])
    folder, title = run.sample_folder(step), f"{run.name}, step {step}"
    # Found as `sdlora sample RUN` finds them, so that both draw the same grid.
    targets = find_run_targets(plan.config, plan.config.sample.prompts)
    shown = [image for _, image in sorted((known | made).items())]
    name = prepared.base.info.name
    grid = make_grid(shown, title=title, targets=targets)
    return save_images(folder, shown, grid, {"base": name, "adapter": run.name})


def _make_cells(run: RunFolder, plan: RunPlan, adapter: Adapter) -> list[Cell]:
    sample, side = plan.config.sample, plan.config.data.resolution or plan.info.resolution
    names = (plan.parents[-1].ancestor.name if plan.parents else "", run.name)
    columns = make_columns(adapter, sample.strengths, path_to_stack(plan.parents), names)
    settings = resolve_settings(plan.info, SampleSettings.of(sample, (side, side)))
    return make_cells(columns, sample.prompts, sample.seeds, settings)


def _find_images(
    accelerator: Accelerator, store: ImageStore, base: Base, cells: Sequence[Cell]
) -> dict[int, SampledImage]:
    """Images of the base by the number of their cell, if all processes find them: they share the rest."""
    found = {number: image for number, cell in enumerate(cells) if (image := store.get(base, cell))}
    hits = torch.tensor([int(number in found) for number in range(len(cells))])
    everywhere = all_reduce_sum(accelerator, hits) == accelerator.num_processes
    return {number: image for number, image in found.items() if everywhere[number]}


def _add_shares(accelerator: Accelerator, images: Sequence[SampledImage]) -> list[SampledImage]:
    """Joins the images that each process made; those of other processes are black."""
    if accelerator.num_processes == 1 or not images:
        return list(images)
    pixels = torch.from_numpy(np.stack([np.asarray(image.image) for image in images]))
    blanks = torch.tensor([BLANKS.index(image.blank) for image in images], dtype=torch.uint8)
    pixels = all_reduce_sum(accelerator, pixels)
    blanks = all_reduce_sum(accelerator, blanks)
    return [
        replace(image, image=Image.fromarray(own.numpy()), blank=BLANKS[blank])
        for image, own, blank in zip(images, pixels, blanks.tolist(), strict=True)
    ]
