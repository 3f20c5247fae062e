"""The training loop: step, record, evaluate, save, sample."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import psutil
import torch
from accelerate import Accelerator

from sdlora.data.records import Size
from sdlora.errors import RunStopped
from sdlora.evaluation.heldout import HeldoutLoss, heldout_loss
from sdlora.export import export_adapter
from sdlora.lora.metadata import run_metadata
from sdlora.runs import RunFolder
from sdlora.training.console import Report
from sdlora.training.device import Precision
from sdlora.training.facts import describe_run
from sdlora.training.guards import (
    Counters,
    check_counters,
    check_dead_modules,
    check_parameters,
    copy_ups,
    find_dead_modules,
)
from sdlora.training.learner import Draw, Learner
from sdlora.training.optimizer import learning_rate
from sdlora.training.plan import RunPlan
from sdlora.training.prepare import Prepared
from sdlora.training.processes import count_over, sum_over
from sdlora.training.resume import load_newest_state, save_state
from sdlora.training.samples import log_grid, sample_step
from sdlora.training.stop import StopSignals

EMA = 0.98


@dataclass(frozen=True)
class StepResult:
    """One optimizer step.

    Args:
        step: Its number, from 1.
        loss: Mean over the samples of the step, on all processes.
        learning_rate: As used.
        grad_norm: Before clipping.
        updated: False if the update was skipped for numbers that are not finite.
        draws: This process's samples.
    """

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    updated: bool
    draws: tuple[Draw, ...]


class Trainer:
    """One run from its first step, or from a checkpoint, to its last."""

    def __init__(
        self,
        run: RunFolder,
        plan: RunPlan,
        prepared: Prepared,
        accelerator: Accelerator,
        precision: Precision,
        report: Report,
    ) -> None:
        # what the run is
        self.run = run
        self.plan = plan
        self.settings = plan.config.train
        self.proof_step = plan.proof_step
        # what learns, and where
        self.prepared = prepared
        self.accelerator = accelerator
        self.learner = Learner(self.settings, prepared, accelerator, precision)
        # how far it is
        self.counters = Counters()
        self.report = report

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.counters.step

    def resume(self) -> None:
        """Continues from the newest complete state."""
        self.counters = load_newest_state(self.run, self.plan, self.learner, self.report)

    def train(self) -> None:
        """Runs the remaining steps; a signal ends the run after the step it came in."""
        with StopSignals() as signals, self.report.progress("training", self.plan.steps, self.step) as meter:
            if self.step == 0:
                self.evaluate_if_due()
            while self.step < self.plan.steps:
                started = time.monotonic()
                result = self.train_step()
                self.record(result, time.monotonic() - started)
                meter.advance(note=f"loss {self.counters.loss_ema or math.nan:.4f}")
                stopping = self.is_stopping(signals)
                self.evaluate_if_due()
                self.save_if_due(stopping)
                if stopping:
                    raise self.stopped(signals.received)
                self.sample_if_due()

    def train_step(self) -> StepResult:
        """One optimizer update."""
        counters, adapter = self.counters, self.learner.adapter
        rate = learning_rate(counters.step, self.settings, self.plan.steps)
        samples = self.plan.order.step(counters.step)
        ups = copy_ups(adapter) if counters.step == self.proof_step else None
        # Dropout could keep a small module from learning, so it is off where each has to.
        gradient = self.learner.accumulate(counters.step, samples, dropout=ups is None)
        self.learner.update(rate, skip=not gradient.is_finite)
        counters.step += 1
        counters.images_seen += len(samples)
        counters.count(gradient.loss, is_good=gradient.is_finite)
        names = ", ".join(sample.record.name for sample in samples)
        situation = (
            f"step {counters.step}, loss {gradient.loss:g}, gradient norm {gradient.norm:g}, "
            f"learning rate {rate:g}, images {names}; {self._last_good()}"
        )
        check_counters(counters, self.settings.max_skipped_steps, situation)
        if ups is not None and gradient.is_finite:
            dead = check_dead_modules(
                find_dead_modules(adapter, ups), self._is_single_token(samples[0].crop.size)
            )
            if dead:
                self.warn(f"{len(dead)} modules cannot learn: self-attention sees a single token")
        return StepResult(
            counters.step, gradient.loss, rate, gradient.norm, gradient.is_finite, gradient.draws
        )

    def _is_single_token(self, size: Size) -> bool:
        """Whether the deepest level of the UNet sees one latent pixel of a picture."""
        info = self.plan.info
        side = int(info.vae_factor * 2 ** (len(info.unet_config["block_out_channels"]) - 1))
        return size.width <= side and size.height <= side

    def record(self, result: StepResult, seconds: float) -> None:
        """Writes the step's event; trackers are told, but cannot stop the run."""
        counters = self.counters
        if math.isfinite(result.loss):
            ema = counters.loss_ema
            counters.loss_ema = result.loss if ema is None else EMA * ema + (1 - EMA) * result.loss
        values = {
            "loss": result.loss,
            "loss_ema": counters.loss_ema,
            "learning_rate": result.learning_rate,
            "grad_norm": result.grad_norm,
            "images_seen": counters.images_seen,
            "steps_per_second": round(1 / max(seconds, 1e-9), 3),
            "memory_mb": round(_memory_mb(self.accelerator.device), 1),
        }
        if norms := self.learner.norms:
            values |= {"norm_mean": norms.mean, "norm_max": norms.largest, "norms_limited": norms.num_limited}
        if not result.updated:
            self.warn(
                f"step {result.step} skipped: loss {result.loss:g}, gradient norm {result.grad_norm:g}",
                images=[draw.image for draw in result.draws],
            )
        rates = self.learner.rates(result.learning_rate)
        groups = rates if len(rates) > 1 else {}
        self.event(
            "step",
            **{name: _json_number(value) for name, value in values.items()},
            **({"learning_rates": groups} if groups else {}),
            skipped=counters.skipped,
        )
        values |= {f"learning_rate/{name}": rate for name, rate in groups.items()}
        self.track({name: value for name, value in values.items() if value is not None})

    def evaluate_if_due(self) -> None:
        """Measures the held-out loss on both splits."""
        if self.step not in self.plan.evaluate_steps:
            return
        for split in self.prepared.splits:
            measured = self.evaluate(split)
            self.event(
                "heldout",
                split=split,
                loss=measured.loss,
                by_band=measured.by_band,
                images=measured.num_images,
            )
            self.track({f"{split}_loss": measured.loss})

    def evaluate(self, split: str) -> HeldoutLoss:
        """The held-out loss of the weights as they are."""
        with self.learner.averaged():
            return heldout_loss(
                self.learner.denoise,
                self.prepared.objective.schedule,
                self.prepared.splits[split],
                batch_size=max(4, self.settings.batch_size or 1),
                device=self.accelerator.device,
                share=(self.accelerator.process_index, self.accelerator.num_processes),
                add_shares=lambda sums: sum_over(self.accelerator, sums.to(self.accelerator.device)).cpu(),
            )

    def save_if_due(self, stopping: bool = False) -> None:
        """Saves the adapter, to use, and the state, to continue."""
        saves, samples = self.step in self.plan.save_steps, self.step in self.plan.sample_steps
        if not (saves or samples or stopping):
            return
        check_parameters(self.learner.adapter, f"step {self.step}; {self._last_good()}")
        if self.accelerator.is_main_process:
            self._save_adapter()
            if saves or stopping:
                self._save_state()

    def _save_adapter(self) -> None:
        facts = describe_run(self.run, self.plan, step=self.step, images_seen=self.counters.images_seen)
        with self.learner.averaged():
            report = export_adapter(
                self.learner.adapter,
                self.run.step_adapter(self.step),
                precision=self.plan.config.export.precision,
                metadata=run_metadata(facts),
            )
        self.event("saved", path=str(report.path.relative_to(self.run.path)), precision=report.precision)

    def _save_state(self) -> None:
        try:
            save_state(self.run, self.plan, self.learner, self.counters)
        except OSError as error:
            self.warn(f"the state of step {self.step} could not be saved ({error}); the run goes on")

    def sample_if_due(self) -> None:
        """Makes a grid of the adapter as saved; running out of memory skips it."""
        if self.step not in self.plan.sample_steps:
            return
        try:
            grid = sample_step(self.run, self.plan, self.prepared, self.step, self.accelerator, self.report)
        except torch.OutOfMemoryError:
            self.warn(f"out of memory while sampling at step {self.step}; the run goes on without this grid")
            return
        if grid is not None:
            self.event("samples", path=str(grid.relative_to(self.run.path)))
            try:
                log_grid(self.accelerator, grid, self.step)
            except Exception as error:
                self.warn(f"a tracker failed: {error}")

    def is_stopping(self, signals: StopSignals) -> bool:
        """Whether any process was told to stop."""
        received = signals.received is not None
        return count_over(self.accelerator, received) > 0

    def stopped(self, signal_number: int | None) -> RunStopped:
        """What is raised after the state was saved."""
        message = f"stopped at step {self.step} of {self.plan.steps}; {self.way_on()}"
        return RunStopped(message, signal_number or 15)

    def way_on(self) -> str:
        """How a run that ended early is taken up again."""
        step = max(self.run.checkpoint_steps(), default=0)
        return f"`sdlora resume {self.run.path}` goes on from step {step}"

    def event(self, name: str, **values: object) -> None:
        """Adds an event; only the main process writes."""
        if self.accelerator.is_main_process:
            self.run.append(name, self.step, **values)

    def warn(self, message: str, **values: object) -> None:
        """Says it, and keeps it as an event."""
        self.report.warn(message)
        self.event("warning", message=message, **values)

    def track(self, values: dict[str, float]) -> None:
        """Tells the trackers; one that fails cannot stop the run."""
        if not self.settings.trackers:
            return
        try:
            self.accelerator.log(values, step=self.step)
        except Exception as error:
            self.warn(f"a tracker failed: {error}")

    def _last_good(self) -> str:
        steps = self.run.checkpoint_steps()
        if not steps:
            return "no checkpoint was saved yet"
        return f"the last good checkpoint is {self.run.checkpoint(steps[-1])}"


def _json_number(value: float | None) -> float | str | None:
    """JSON has no NaN and no infinity."""
    return value if value is None or math.isfinite(value) else str(value)


def _memory_mb(device: torch.device) -> float:
    """Memory in use: peak on CUDA, else that of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return float(psutil.Process().memory_info().rss) / 1e6
