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
from sdlora.report.terminal import Terminal
from sdlora.runs import RunFolder
from sdlora.sampling.generate import make_columns
from sdlora.sampling.images import BLANKS, SampledImage
from sdlora.sampling.request import make_pictures, request_of_run, write_images
from sdlora.training.batch_size import as_out_of_memory
from sdlora.training.distributed import all_reduce_count, all_reduce_sum, barrier
from sdlora.training.plan import RunPlan
from sdlora.training.prepare import Prepared


class _Stopping(Exception):
    """A signal came while images were made."""


def sample_step(
    run: RunFolder,
    plan: RunPlan,
    prepared: Prepared,
    step: int,
    accelerator: Accelerator,
    terminal: Terminal,
    stops: Callable[[], bool] = lambda: False,
) -> Path | None:
    """Samples the adapter saved at a step, each process a share; the main one returns the grid's path.

    Args:
        stops: Whether this process was told to stop. Then the grid is left out, since it may take longer than
            a batch scheduler waits; a resumed run makes it first.

    Raises:
        OutOfMemoryError: On all processes, if one of them ran out of memory.
    """
    # The main process has just written the adapter that all now read.
    barrier(accelerator)
    request = request_of_run(plan.config, plan.info)
    names = (plan.parents[-1].ancestor.name if plan.parents else "", run.name)
    columns = make_columns(load_adapter(run.step_adapter(step)), request.strengths, prepared.parents, names)
    images: list[SampledImage] = []
    with terminal.progress(f"samples of step {step}", 1) as meter:

        def show(done: int, total: int) -> None:
            meter.show(done, total)
            if stops():
                raise _Stopping

        with suppress(torch.OutOfMemoryError, _Stopping), as_out_of_memory():
            images = make_pictures(
                prepared.base,
                columns,
                request,
                text=prepared.prompt_states,
                progress=show,
                share=(accelerator.process_index, accelerator.num_processes),
            )
        if all_reduce_count(accelerator, not images):
            if all_reduce_count(accelerator, stops()):
                return None
            clear_device_cache()
            raise torch.OutOfMemoryError("out of memory while sampling")
    images = _add_shares(accelerator, images)
    if not accelerator.is_main_process:
        return None
    folder, title = run.sample_folder(step), f"{run.name}, step {step}"
    return write_images(folder, images, base=prepared.base.info.name, adapter=run.name, title=title)


def _add_shares(accelerator: Accelerator, images: Sequence[SampledImage]) -> list[SampledImage]:
    """All images, from those that each process made; the rest of its own are black."""
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


def log_grid(accelerator: Accelerator, grid: Path, step: int) -> None:
    """Shows the grid in TensorBoard."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            with Image.open(grid) as image:
                pixels = np.asarray(image.convert("RGB"))
            tracker.log_images({"samples": pixels[None]}, step=step, dataformats="NHWC")
