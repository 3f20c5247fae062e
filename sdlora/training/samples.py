"""Grids during training: the same code path as `sdlora sample`, on the adapter as saved."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from accelerate import Accelerator
from PIL import Image

from sdlora.lora.files import load_adapter
from sdlora.runs import RunFolder
from sdlora.sampling.session import request_of_run, sample_to_folder
from sdlora.training.console import Report
from sdlora.training.plan import RunPlan
from sdlora.training.prepare import Prepared


def sample_step(
    run: RunFolder, plan: RunPlan, prepared: Prepared, step: int, accelerator: Accelerator, report: Report
) -> Path | None:
    """Samples the adapter saved at a step; the main process returns the grid's path."""
    grid = None
    if accelerator.is_main_process:
        with report.progress(f"samples of step {step}", 1) as meter:
            grid = sample_to_folder(
                prepared.base,
                load_adapter(run.step_adapter(step)),
                request_of_run(plan.config, plan.info),
                run.sample_folder(step),
                name=run.name,
                title=f"{run.name}, step {step}",
                text=prepared.prompt_states,
                progress=meter.show,
            )
    accelerator.wait_for_everyone()
    return grid


def log_grid(accelerator: Accelerator, grid: Path, step: int) -> None:
    """Shows the grid in TensorBoard."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            with Image.open(grid) as image:
                pixels = np.asarray(image.convert("RGB"))
            tracker.log_images({"samples": pixels[None]}, step=step, dataformats="NHWC")
