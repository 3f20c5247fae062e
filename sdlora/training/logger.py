"""Events, trackers, warnings and the trace of a run. A failure to log never stops the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from PIL import Image

from sdlora.config import RunConfig
from sdlora.errors import ConfigError, one_line
from sdlora.report.terminal import Terminal
from sdlora.runs import RunFolder
from sdlora.training.distributed import all_gather
from sdlora.training.health import Counters
from sdlora.training.step import StepResult


class MetricLogger:
    """Writes events and passes metrics to the trackers, on the main process."""

    def __init__(
        self, run: RunFolder, config: RunConfig, accelerator: Accelerator, terminal: Terminal
    ) -> None:
        self.run = run
        self.settings = config.train
        self.accelerator = accelerator
        self.terminal = terminal
        self.failed: set[str] = set()

    def event(self, name: str, step: int, **values: object) -> None:
        """Adds an event to `events.jsonl`."""
        if not self.accelerator.is_main_process:
            return
        try:
            self.run.append(name, step, **values)
        except OSError as error:
            self.terminal.warn(f"cannot write the event {name}: {error}")

    def warn(self, step: int, message: str, **values: object) -> None:
        """Prints a warning and adds its event."""
        self.terminal.warn(message)
        self.event("warning", step, message=message, **values)

    def track(self, step: int, values: Mapping[str, float]) -> None:
        """Passes metrics to the trackers."""
        self._pass(step, lambda tracker: tracker.log(dict(values), step=step))

    def track_grid(self, step: int, grid: Path) -> None:
        """Passes a grid to the trackers that take images."""

        def give(tracker: Any) -> None:
            with Image.open(grid) as image:
                _log_image(tracker, np.asarray(image.convert("RGB")), step)

        self._pass(step, give)

    def finish_trackers(self, step: int) -> None:
        """Closes the trackers."""
        self._pass(step, lambda tracker: tracker.finish())

    def _pass(self, step: int, give: Callable[[Any], object]) -> None:
        """Gives each tracker something; warns of one that fails once."""
        for tracker in self.accelerator.trackers:
            try:
                give(tracker)
            except Exception as error:
                if tracker.name not in self.failed:
                    self.failed.add(tracker.name)
                    self.warn(step, f"the tracker {tracker.name} failed: {one_line(str(error))}")

    def record(self, result: StepResult, counters: Counters, seconds: float) -> None:
        """Logs a step."""
        self._trace(result)
        if not result.updated:
            self.warn(
                result.step,
                f"step {result.step} skipped: loss {result.loss:g}, gradient norm {result.grad_norm:g}",
                images=result.images,
            )
        values = {
            "loss": result.loss,
            "loss_ema": counters.loss_ema,
            "learning_rate": result.learning_rate,
            "grad_norm": result.grad_norm,
            "images_seen": counters.images_seen,
            "steps_per_second": round(1 / max(seconds, 1e-9), 3),
            "memory_mb": round(_memory_mb(self.accelerator.device), 1),
        }
        if norms := result.norms:
            values |= {"norm_mean": norms.mean, "norm_max": norms.largest, "norms_limited": norms.num_limited}
        by_group = {"learning_rates": result.rates} if len(result.rates) > 1 else {}
        self.event("step", result.step, **values, **by_group, skipped=counters.skipped)
        if by_group:
            values |= {f"learning_rate/{name}": rate for name, rate in result.rates.items()}
        self.track(result.step, {name: value for name, value in values.items() if value is not None})

    def _trace(self, result: StepResult) -> None:
        """Writes the draws of all processes, with `train.trace`."""
        if not self.settings.trace:
            return
        draws = sorted(chain(*all_gather(self.accelerator, result.draws)), key=lambda draw: draw.index)
        if not self.accelerator.is_main_process:
            return
        try:
            self.run.append_trace([{"step": result.step, **asdict(draw)} for draw in draws])
        except OSError as error:
            self.warn(result.step, f"cannot write the trace of step {result.step}: {error}")


def _log_image(tracker: Any, pixels: Any, step: int) -> None:
    """Logs an image, (H, W, 3) uint8, by accelerate's `log_images`, or as the library itself does it."""
    if tracker.name == "tensorboard":
        tracker.log_images({"samples": pixels[None]}, step=step, dataformats="NHWC")
    elif tracker.name == "trackio":
        tracker.log({"samples": import_module("trackio").Image(pixels)}, step=step)
    elif tracker.name == "mlflow":
        import_module("mlflow").log_image(pixels, key="samples", step=step)
    elif tracker.name == "comet_ml":
        tracker.tracker.log_image(pixels, name="samples", step=step)
    elif tracker.name == "dvclive":
        tracker.tracker.log_image(f"samples/step-{step:06d}.png", pixels)
    elif hasattr(tracker, "log_images"):
        is_one = tracker.name in ("aim", "clearml")
        tracker.log_images({"samples": pixels if is_one else [pixels]}, step=step)


def start_trackers(accelerator: Accelerator, folder: Path, config: RunConfig) -> None:
    """Starts the trackers of `train.trackers`, which write into the folder and show the settings.

    Raises a ConfigError if one cannot be started, such as one that lacks a key.
    """
    settings = {
        f"{section}.{key}": str(value)
        for section, keys in config.model_dump(mode="json").items()
        if isinstance(keys, dict)
        for key, value in keys.items()
    }
    logs = str(folder / "tensorboard")
    accelerator.project_configuration = ProjectConfiguration(project_dir=str(folder), logging_dir=logs)
    try:
        accelerator.init_trackers("sdlora", config=settings)
    except Exception as error:
        names = ", ".join(config.train.trackers)
        problem = f"train.trackers = {names} cannot be started: {one_line(str(error))}"
        raise ConfigError(f"{problem}; correct that, or remove the setting") from error


def _memory_mb(device: torch.device) -> float:
    """Peak memory since the stage began on CUDA, else the memory of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return float(psutil.Process().memory_info().rss) / 1e6
