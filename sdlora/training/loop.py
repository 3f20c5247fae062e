"""The training loop: step, record, evaluate, save, sample."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from functools import partial
from types import FrameType, TracebackType
from typing import Any

import torch
from accelerate import Accelerator

from sdlora.data.records import Size
from sdlora.errors import AdapterError, RunStopped
from sdlora.evaluation.heldout import HeldoutLoss, heldout_loss
from sdlora.export.export import export_adapter
from sdlora.export.metadata import run_metadata
from sdlora.models.dtypes import Precision
from sdlora.report.summary import describe_step
from sdlora.report.terminal import Terminal
from sdlora.runs import RunFolder
from sdlora.training.batch_size import fit_batch
from sdlora.training.distributed import all_reduce_count, all_reduce_sum, barrier
from sdlora.training.health import (
    Counters,
    check_counters,
    check_dead_modules,
    check_parameters,
    copy_starts,
    find_dead_modules,
    is_finite,
)
from sdlora.training.logger import MetricLogger, StepResult, gather_draws
from sdlora.training.metadata import training_metadata
from sdlora.training.optimizer import learning_rate
from sdlora.training.plan import RunPlan
from sdlora.training.prepare import Prepared
from sdlora.training.resume import load_state, newest_complete_step, save_state
from sdlora.training.samples import log_grid, sample_step
from sdlora.training.step import StepRunner

# Batch schedulers send SIGUSR1 ahead of the end of a job's time; Windows has none.
SIGNALS = (signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []))
# A launcher passes on what its processes may have got already, such as from the same Ctrl-C or scheduler.
ECHO_SECONDS = 2.0


class StopSignals:
    """A context in which the first signal is only noted, in `received`."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._time = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        # Python allows handlers in the main thread only.
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    @property
    def exit_signal(self) -> int:
        """What the exit code says: SIGINT, or SIGTERM for all that a scheduler sends."""
        return signal.SIGINT if self.received == signal.SIGINT else signal.SIGTERM

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._time = number, time.monotonic()
            if "LOCAL_RANK" not in os.environ:
                self._restore()
        elif time.monotonic() - self._time > ECHO_SECONDS:
            self._restore()
            os.kill(os.getpid(), number)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


class Trainer:
    """One run from its first step, or from a checkpoint, to its last."""

    def __init__(
        self,
        run: RunFolder,
        plan: RunPlan,
        prepared: Prepared,
        accelerator: Accelerator,
        precision: Precision,
        terminal: Terminal,
    ) -> None:
        # what the run is
        self.run = run
        self.plan = plan
        self.settings = plan.config.train
        self.proof_step = plan.proof_step()
        # what learns, and where
        self.prepared = prepared
        self.accelerator = accelerator
        self.runner = StepRunner(self.settings, prepared, accelerator, precision)
        # how far it is
        self.counters = Counters()
        self.signals = StopSignals()
        self.terminal = terminal
        self.logger = MetricLogger(run, accelerator, terminal, self.settings)

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.counters.step

    def resume(self, step: int | None = None) -> None:
        """Continues from the state of a step, or the newest complete one; 0 is the start."""
        step = newest_complete_step(self.run, self.terminal) if step is None else step
        self.counters = load_state(self.run, step, self.runner) if step else Counters()

    def fit_batch(self) -> None:
        """Finds what `train.batch_size = auto` stands for."""
        self.plan = fit_batch(self.plan, self.runner, self.accelerator)
        self.settings = self.runner.settings = self.plan.config.train
        size, count = self.settings.batch_size, self.settings.accumulate
        self.terminal.print(f"batch     {size} fit at once, {count} times a step (train.batch_size = auto)")
        self.event("batch_size", batch_size=size, accumulate=count)

    def train(self) -> None:
        """Runs the remaining steps; a signal ends the run after the step it came in."""
        with self.signals, self.terminal.progress("training", self.plan.steps, self.step) as meter:
            self.begin()
            while self.step < self.plan.steps:
                started = time.monotonic()
                result = self.train_step()
                self.record(result, time.monotonic() - started)
                meter.advance(note=f"loss {self.counters.loss_ema or math.nan:.4f}")
                stopping = self.is_stopping()
                self.evaluate_if_due()
                self.save_if_due(stopping)
                if not stopping and self.step in self.plan.sample_steps:
                    self.sample_if_due()
                    stopping = self.is_stopping()
                    self.save_state_if_missing(stopping)
                if stopping:
                    # Each names the step that it goes on from, so all wait until that is saved.
                    barrier(self.accelerator)
                    raise self.stopped()

    def begin(self) -> None:
        """Measures the base; or makes the grid that a stop after the checkpoint left out."""
        if self.step == 0:
            self.evaluate_if_due()
        elif all_reduce_count(self.accelerator, self.accelerator.is_main_process and not self._is_sampled()):
            self.sample_if_due()

    def _is_sampled(self) -> bool:
        return any(event["step"] == self.step for event in self.run.events("samples"))

    def train_step(self) -> StepResult:
        """One optimizer update."""
        counters, adapter = self.counters, self.runner.adapter
        rate = learning_rate(counters.step, self.settings, self.plan.steps)
        samples = self.plan.order.step(counters.step)
        ups = copy_starts(adapter) if counters.step == self.proof_step else None
        # Dropout could keep a small module from learning, so it is off where each has to.
        gradient = self.runner.compute_gradients(counters.step, samples, dropout=ups is None)
        self.runner.update(rate, skip=not gradient.is_finite)
        counters.step += 1
        counters.images_seen += len(samples)
        far = counters.count(gradient.loss, gradient.norm, is_good=gradient.is_finite)
        images = tuple(sample.record.name for sample in samples)
        situation = (
            f"step {counters.step}, loss {gradient.loss:g}, gradient norm {gradient.norm:g}, "
            f"learning rate {rate:g}, images {', '.join(images)}; {self._last_good()}"
        )
        check_counters(counters, self.settings.max_skipped_steps, situation)
        if not is_finite(self.runner.parameters):
            check_parameters(adapter, situation)
        if far:
            self.warn(f"step {counters.step} is far from the others: {', '.join(far)}", images=images)
        if ups is not None and not gradient.is_finite:
            # It was skipped, as the first ones in fp16 are until the scale fits.
            self.proof_step = self.plan.proof_step(counters.step)
        elif ups is not None:
            dead = check_dead_modules(
                find_dead_modules(adapter, ups), self._is_single_token(samples[0].crop.size)
            )
            if dead:
                self.warn(f"{len(dead)} modules cannot learn: self-attention sees a single token")
        draws = gradient.draws
        if self.settings.trace:
            draws = gather_draws(self.accelerator, samples, draws)
        return StepResult(
            counters.step,
            gradient.loss,
            rate,
            gradient.norm,
            gradient.is_finite,
            images,
            draws,
            self.runner.rates(rate),
            self.runner.norms,
        )

    def _is_single_token(self, size: Size) -> bool:
        """Whether the deepest level of the UNet sees one latent pixel of an image."""
        info = self.plan.info
        side = int(info.vae_factor * 2 ** (len(info.unet_config["block_out_channels"]) - 1))
        return size.width <= side and size.height <= side

    def record(self, result: StepResult, seconds: float) -> None:
        """Writes what the step was."""
        self.logger.record(result, self.counters, seconds)

    def evaluate_if_due(self) -> None:
        """Measures the held-out loss on both splits."""
        if self.step not in self.plan.evaluate_steps:
            return
        losses = {}
        for split in self.prepared.splits:
            measured = self.evaluate(split)
            losses[split] = measured.loss
            self.event(
                "heldout",
                split=split,
                loss=measured.loss,
                by_band=measured.by_band,
                images=measured.num_images,
            )
            self.logger.track(self.step, {f"{split}_loss": measured.loss})
        # A log or a notebook shows no bar, and nobody the course of these.
        self.terminal.print(describe_step(self.run, self.step, losses))

    def evaluate(self, split: str) -> HeldoutLoss:
        """The held-out loss of the weights as they are."""
        with self.runner.inference_weights():
            return heldout_loss(
                self.runner.denoise,
                self.prepared.objective.schedule,
                self.prepared.heldout_items(split),
                batch_size=max(4, self.settings.micro_batch),
                device=self.accelerator.device,
                share=(self.accelerator.process_index, self.accelerator.num_processes),
                add_shares=partial(all_reduce_sum, self.accelerator),
            )

    def save_if_due(self, stopping: bool = False) -> None:
        """Saves the adapter, to use, and the state, to continue."""
        saves, samples = self.step in self.plan.save_steps, self.step in self.plan.sample_steps
        if not (saves or samples or stopping):
            return
        if not self.accelerator.is_main_process:
            return
        is_kept = self._save_adapter()
        if saves or stopping:
            is_kept = self._save_state() or is_kept
            if not is_kept:
                # Nor could what the run does from here on be kept.
                raise OSError(
                    f"neither the adapter nor the state of step {self.step} could be saved; make room"
                )

    def save_state_if_missing(self, stopping: bool) -> None:
        """Saves the state of a step at which a signal came while its grid was made."""
        if stopping and self.step not in self.plan.save_steps and self.accelerator.is_main_process:
            self._save_state()

    def _save_adapter(self) -> bool:
        facts = training_metadata(self.run, self.plan, step=self.step, images_seen=self.counters.images_seen)
        try:
            with self.runner.inference_weights():
                exported = export_adapter(
                    self.runner.adapter,
                    self.run.step_adapter(self.step),
                    precision=self.plan.config.export.precision,
                    metadata=run_metadata(facts),
                )
        except AdapterError as error:
            if not isinstance(error.__cause__, OSError):
                raise
            self.warn(f"the adapter of step {self.step} could not be saved ({error.__cause__})")
            return False
        self.event("saved", path=str(exported.path.relative_to(self.run.path)), precision=exported.precision)
        return True

    def _save_state(self) -> bool:
        try:
            save_state(self.run, self.plan, self.runner, self.counters)
        except OSError as error:
            self.warn(f"the state of step {self.step} could not be saved ({error})")
            return False
        return True

    def sample_if_due(self) -> None:
        """Makes a grid of the adapter as saved; running out of memory skips it, a signal puts it off."""
        if self.step not in self.plan.sample_steps:
            return
        is_missing = self.accelerator.is_main_process and not self.run.step_adapter(self.step).is_file()
        if all_reduce_count(self.accelerator, is_missing):
            self.warn(f"no samples of step {self.step}, since its adapter could not be saved")
            return
        try:
            grid = sample_step(
                self.run,
                self.plan,
                self.prepared,
                self.step,
                self.accelerator,
                self.terminal,
                stops=lambda: self.signals.received is not None,
            )
        except torch.OutOfMemoryError:
            self.warn(f"out of memory while sampling at step {self.step}; the run goes on without this grid")
            return
        except OSError as error:
            self.warn(f"the samples of step {self.step} could not be saved ({error}); the run goes on")
            return
        if grid is not None:
            self.event("samples", path=str(grid.relative_to(self.run.path)))
            try:
                log_grid(self.accelerator, grid, self.step)
            except Exception as error:
                self.warn(f"a tracker failed: {error}")

    def is_stopping(self) -> bool:
        """Whether any process was told to stop."""
        received = self.signals.received is not None
        return all_reduce_count(self.accelerator, received) > 0

    def stopped(self) -> RunStopped:
        """What is raised after the state was saved."""
        message = f"stopped at step {self.step} of {self.plan.steps}; {self.resume_hint()}"
        return RunStopped(message, self.signals.exit_signal)

    def resume_hint(self) -> str:
        """How a run that ended early is taken up again."""
        step = max(self.run.checkpoint_steps(), default=0)
        return f"`sdlora resume {self.run.path}` goes on from step {step}"

    def event(self, name: str, **values: object) -> None:
        """Adds an event."""
        self.logger.event(name, self.step, **values)

    def warn(self, message: str, **values: object) -> None:
        """Says it, and keeps it as an event."""
        self.logger.warn(self.step, message, **values)

    def _last_good(self) -> str:
        # One that was saved while steps were skipped has what makes them be.
        good = self.step - self.counters.skipped_in_row
        steps = [step for step in self.run.checkpoint_steps() if step <= good]
        if not steps:
            return "no checkpoint was saved before that"
        return f"the last good checkpoint is {self.run.checkpoint(steps[-1])}"
