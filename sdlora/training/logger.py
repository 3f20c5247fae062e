"""What a run tells on its way: events, trackers, warnings, the trace. Nothing that fails here can stop it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import psutil
import torch
from accelerate import Accelerator

from sdlora.config import TrainSection
from sdlora.data.batches import Sample
from sdlora.lora.adapter import NormReport
from sdlora.report.terminal import Terminal
from sdlora.runs import RunFolder
from sdlora.training.distributed import all_reduce_sum
from sdlora.training.health import Counters
from sdlora.training.step import Draw


@dataclass(frozen=True)
class StepResult:
    """One optimizer step.

    Args:
        step: Its number, from 1.
        loss: Mean over the samples of the step, on all processes.
        learning_rate: As used.
        grad_norm: Before clipping.
        updated: False if the update was skipped for numbers that are not finite.
        images: The images of the step, on all processes.
        draws: This process's samples; with `train.trace`, those of all.
        rates: The learning rate of each group of parameters.
        norms: Of the adapter, where they are limited.
    """

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    updated: bool
    images: tuple[str, ...]
    draws: tuple[Draw, ...]
    rates: Mapping[str, float]
    norms: NormReport | None = None


class MetricLogger:
    """Writes events and tells trackers; only the main process does.

    Args:
        settings: `trackers` and `trace` are used.
    """

    def __init__(
        self, run: RunFolder, accelerator: Accelerator, terminal: Terminal, settings: TrainSection
    ) -> None:
        self.run = run
        self.accelerator = accelerator
        self.terminal = terminal
        self.settings = settings

    def event(self, name: str, step: int, **values: object) -> None:
        """Adds an event."""
        if not self.accelerator.is_main_process:
            return
        try:
            self.run.append(name, step, **values)
        except OSError as error:
            self.terminal.warn(f"the event {name} could not be written: {error}")

    def warn(self, step: int, message: str, **values: object) -> None:
        """Says it, and keeps it as an event."""
        self.terminal.warn(message)
        self.event("warning", step, message=message, **values)

    def track(self, step: int, values: Mapping[str, float]) -> None:
        """Tells the trackers."""
        if not self.settings.trackers:
            return
        try:
            self.accelerator.log(dict(values), step=step)
        except Exception as error:
            self.warn(step, f"a tracker failed: {error}")

    def record(self, result: StepResult, counters: Counters, seconds: float) -> None:
        """Writes what a step was."""
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
        groups = dict(result.rates) if len(result.rates) > 1 else {}
        self.event(
            "step",
            result.step,
            **values,
            **({"learning_rates": groups} if groups else {}),
            skipped=counters.skipped,
        )
        values |= {f"learning_rate/{name}": rate for name, rate in groups.items()}
        self.track(result.step, {name: value for name, value in values.items() if value is not None})

    def _trace(self, result: StepResult) -> None:
        """Writes what was drawn, where that is asked for."""
        if not self.settings.trace or not self.accelerator.is_main_process:
            return
        try:
            self.run.append_trace([{"step": result.step, **asdict(draw)} for draw in result.draws])
        except OSError as error:
            self.warn(result.step, f"the trace of step {result.step} could not be written: {error}")


def gather_draws(
    accelerator: Accelerator, samples: Sequence[Sample], own: Sequence[Draw]
) -> tuple[Draw, ...]:
    """The draws of all samples of a step, in their order.

    Args:
        samples: Those of the step.
        own: This process's draws.
    """
    numbers = torch.zeros((len(samples), 2), dtype=torch.int64)
    places = {sample.index: place for place, sample in enumerate(samples)}
    for draw in own:
        numbers[places[draw.index]] = torch.tensor([draw.noise_seed, draw.timestep])
    rows = all_reduce_sum(accelerator, numbers).tolist()
    return tuple(
        Draw(sample.index, sample.record.name, sample.caption, seed, timestep)
        for sample, (seed, timestep) in zip(samples, rows, strict=True)
    )


def _memory_mb(device: torch.device) -> float:
    """Memory in use: peak on CUDA, else that of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return float(psutil.Process().memory_info().rss) / 1e6
