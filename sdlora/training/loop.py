"""The training loop: step, record, evaluate, save, sample."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache
from torch import Tensor

from sdlora.data.batches import Sample
from sdlora.dtypes import Precision
from sdlora.errors import AdapterError, RunStopped
from sdlora.evaluation.heldout import HeldoutLoss, Share, heldout_loss
from sdlora.export.export import export_adapter
from sdlora.export.metadata import run_metadata
from sdlora.memory.work import SpeedMeter, as_time, describe_times
from sdlora.report.summary import describe_rise, describe_step
from sdlora.report.terminal import Meter, Terminal
from sdlora.runs import RunFolder
from sdlora.training.checkpoint import load_state, newest_complete_step, save_state, training_metadata
from sdlora.training.device import as_out_of_memory
from sdlora.training.distributed import StopSignals, all_reduce_count, all_reduce_sum, barrier
from sdlora.training.health import Counters, Health
from sdlora.training.logger import MetricLogger
from sdlora.training.optimizer import learning_rate
from sdlora.training.plan import RunPlan
from sdlora.training.prepare import Prepared
from sdlora.training.samples import SamplingStopped, sample_step
from sdlora.training.step import StepResult, StepRunner

MIN_EVALUATION_BATCH = 4
# Tensors that the optimizer adds for each trained one: the two moments of AdamW.
NUM_MOMENTS = 2


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
        self.run, self.plan, self.prepared = run, plan, prepared
        self.accelerator, self.terminal = accelerator, terminal
        self.runner = StepRunner(plan.config.train, prepared, accelerator, precision)
        self.logger = MetricLogger(run, plan.config, accelerator, terminal)
        self.health = Health(run, plan, prepared.adapter, self.warn)
        self.signals = StopSignals()
        self.has_risen = False  # the loss on held-out images, which is said once
        self.pace = SpeedMeter(plan.speed, prepared.watch, plan.work_left())

    @property
    def counters(self) -> Counters:
        return self.health.counters

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.counters.step

    def resume(self, step: int | None = None) -> None:
        """Continues from the checkpoint of a step, or from the newest complete one; 0 is the start."""
        step = newest_complete_step(self.run, self.terminal) if step is None else step
        self.health.restore(load_state(self.run, step, self.runner) if step else Counters())
        self.pace = SpeedMeter(self.plan.speed, self.prepared.watch, self.plan.work_left(self.step))

    def fit_batch(self) -> None:
        """Resolves `train.batch_size = auto`: the largest micro-batch that fits; the global batch is kept."""
        size = find_batch_size(self.plan, self.runner, self.accelerator)
        count = self.plan.config.train.accumulate // size
        config = self.plan.config.replace(train={"batch_size": size, "accumulate": count})
        self.plan = replace(self.plan, config=config)
        self.runner.settings = config.train
        self.terminal.print(f"batch     train.batch_size = auto: {size} fit, train.accumulate = {count}")
        self.event("batch_size", batch_size=size, accumulate=count)

    def train(self) -> None:
        """Runs the remaining steps; a signal ends the run after the step in which it came."""
        watch, progress = self.prepared.watch, self.terminal.progress("training", self.plan.steps, self.step)
        with self.signals, watch.stage("training"), progress as meter:
            first = self.step + 1
            self.begin()
            while self.step < self.plan.steps:
                started = time.monotonic()
                result = self.train_step()
                self.record(result, time.monotonic() - started)
                self.show_progress(meter, self.step - first)
                stopping, saving, sampling = self.poll()
                if not stopping:  # what a signal postpones is done when the run is resumed
                    self.evaluate_if_due()
                self.save_if_due(stopping or saving, sampling)
                if self.step in self.plan.save_steps:
                    meter.beat()
                if not stopping and (sampling or self.step in self.plan.sample_steps):
                    self.sample()
                    if stopping := self.is_stopping():
                        self.save_missing_checkpoint()
                if stopping:
                    # The message names the checkpoint to continue from: wait until it is saved.
                    barrier(self.accelerator)
                    message = f"stopped at step {self.step} of {self.plan.steps}; {self.resume_hint()}"
                    raise RunStopped(message, self.signals.exit_signal)

    def show_progress(self, meter: Meter, num_before: int) -> None:
        """Advances the bar by a step; the time left is that of all stages, and told after the third step."""
        left = self.plan.work_left(self.step)
        if num_before == 0:
            self.pace.warm_up(left)
        speed = self.pace.speed(left)
        seconds = speed.seconds(left) if speed else {}
        rest = sum(seconds.values()) + speed.rest if speed and num_before else None
        meter.advance(note=f"loss {self.counters.loss_ema or math.nan:.4f}", rest=rest)
        if num_before == 2 and rest is not None:
            self.terminal.print(f"time left about {as_time(rest)}: {describe_times(seconds)}".rstrip(": "))

    def begin(self) -> None:
        """Measures the loss of the base; of a checkpoint, what a signal postponed: its loss and its grid."""
        if self.accelerator.is_main_process:
            self.run.take_requests()  # of a process before this one
        if self._lacks("heldout"):
            self.evaluate_if_due()
        if self.step in self.plan.sample_steps and self._lacks("samples"):
            self.sample()

    def _lacks(self, event: str) -> bool:
        """Whether the run has no such event of the current step."""
        is_main = self.accelerator.is_main_process
        lacks = is_main and not any(one["step"] == self.step for one in self.run.events(event))
        return all_reduce_count(self.accelerator, lacks) > 0

    def train_step(self) -> StepResult:
        """One optimizer update."""
        step, runner = self.step, self.runner
        samples = self.plan.order.step(step)
        rate = learning_rate(step, self.plan.config.train, self.plan.steps)
        rates = runner.set_learning_rate(rate)
        runner.checks_first_update = self.health.checks_first_update
        total, draws = runner.compute_gradients(step, samples)
        # The CPU waits for these, and in `Health` for whether all parameters are finite.
        loss, norm = torch.stack([total, runner.clip_gradients()]).tolist()
        updated = math.isfinite(loss) and math.isfinite(norm)
        runner.update(skip=not updated)
        result = StepResult(
            step=step + 1,
            loss=loss,
            learning_rate=rate,
            grad_norm=norm,
            updated=updated,
            images=tuple(sample.record.name for sample in samples),
            draws=draws,
            rates=rates,
            norms=runner.norms,
        )
        self.health.check(result)
        return result

    def record(self, result: StepResult, seconds: float) -> None:
        """Logs a step."""
        self.logger.record(result, self.counters, seconds)

    def evaluate_if_due(self) -> None:
        """Evaluates the held-out loss on both splits."""
        if self.step not in self.plan.evaluate_steps:
            return
        losses = {}
        for split in self.prepared.splits:
            with self.prepared.watch.stage("validation"):
                measured = self.evaluate(split)
            losses[split] = loss = measured.loss
            count, bands = measured.num_images, measured.by_band
            self.event("heldout", split=split, loss=loss, by_band=bands, images=count)
            self.logger.track(self.step, {f"{split}_loss": loss})
        # Logs and notebooks show no progress bar.
        self.terminal.print(describe_step(self.run, self.step, losses))
        # At the end, more is said.
        if self.step < self.plan.steps and not self.has_risen and (rise := describe_rise(self.run)):
            self.has_risen = True
            self.warn(rise)

    def evaluate(self, split: str) -> HeldoutLoss:
        """The held-out loss of the current weights."""
        processes = self.accelerator
        total = partial(all_reduce_sum, processes)
        with self.runner.inference_weights():
            return heldout_loss(
                self.runner.denoise,
                self.prepared.objective.schedule,
                self.prepared.heldout_items(split),
                batch_size=max(MIN_EVALUATION_BATCH, self.plan.config.train.micro_batch),
                device=processes.device,
                share=Share(processes.process_index, processes.num_processes, total),
            )

    def save_if_due(self, saving: bool = False, sampling: bool = False) -> None:
        """Saves the adapter, to use, and the checkpoint, to continue from.

        Raises an OSError if a step that must leave a checkpoint could leave neither.
        """
        needs_checkpoint = self.step in self.plan.save_steps or saving
        if not (needs_checkpoint or sampling or self.step in self.plan.sample_steps):
            return
        if not self.accelerator.is_main_process:
            return
        is_saved = self._save_adapter()
        if needs_checkpoint and not (self._save_checkpoint() or is_saved):
            raise OSError(f"cannot save the adapter or the checkpoint of step {self.step}; free disk space")

    def save_missing_checkpoint(self) -> None:
        """Saves the checkpoint of a step whose grid a signal interrupted."""
        if self.step not in self.plan.save_steps and self.accelerator.is_main_process:
            self._save_checkpoint()

    def _save_adapter(self) -> bool:
        metadata = run_metadata(training_metadata(self.run, self.plan, self.counters))
        path, precision = self.run.step_adapter(self.step), self.plan.config.export.precision
        try:
            with self.runner.inference_weights():
                saved = export_adapter(self.runner.adapter, path, precision=precision, metadata=metadata)
        except AdapterError as error:
            if not isinstance(error.__cause__, OSError):
                raise
            self.warn(f"cannot save the adapter of step {self.step}: {error.__cause__}")
            return False
        self.event("saved", path=str(path.relative_to(self.run.path)), precision=saved.precision)
        return True

    def _save_checkpoint(self) -> bool:
        try:
            save_state(self.run, self.plan, self.runner, self.counters)
        except OSError as error:
            self.warn(f"cannot save the checkpoint of step {self.step}: {error}")
            return False
        return True

    def sample(self) -> None:
        """Makes a grid of the saved adapter; running out of memory skips it, a signal postpones it."""
        is_missing = self.accelerator.is_main_process and not self.run.step_adapter(self.step).is_file()
        if all_reduce_count(self.accelerator, is_missing):
            self.warn(f"no samples at step {self.step}: its adapter could not be saved")
            return
        try:
            title, watch = f"samples of step {self.step}", self.prepared.watch
            with watch.stage("sampling"), self.terminal.progress(title, 1) as meter:

                def advance(done: int, total: int) -> None:
                    meter.show(done, total)
                    if self.signals.received is not None:
                        raise SamplingStopped

                grid = sample_step(
                    self.run, self.plan, self.prepared, self.accelerator, self.step, progress=advance
                )
        except torch.OutOfMemoryError:
            self.warn(f"no samples at step {self.step}: out of memory; training continues")
            return
        except OSError as error:
            self.warn(f"cannot save the samples of step {self.step}: {error}; training continues")
            return
        if grid is not None:
            self.event("samples", path=str(grid.relative_to(self.run.path)))
            self.logger.track_grid(self.step, grid)

    def poll(self) -> tuple[bool, bool, bool]:
        """Whether any process received a signal, and whether a person asked to save, or to sample.

        Without grids, the encoders of prompts are not there to sample.
        """
        asked = self.run.take_requests() if self.accelerator.is_main_process else set()
        own = (self.signals.received is not None, "save" in asked, "sample" in asked)
        stopping, saving, sampling = all_reduce_sum(self.accelerator, torch.tensor(own).int()).tolist()
        return stopping > 0, saving > 0, sampling > 0 and bool(self.plan.sample_steps)

    def is_stopping(self) -> bool:
        """Whether any process received a signal."""
        return all_reduce_count(self.accelerator, self.signals.received is not None) > 0

    def resume_hint(self) -> str:
        """How to continue a run that ended early."""
        step = max(self.run.checkpoint_steps(), default=0)
        return f"`sdlora resume {self.run.path}` continues from step {step}"

    def event(self, name: str, **values: object) -> None:
        """Adds an event at the current step."""
        self.logger.event(name, self.step, **values)

    def warn(self, message: str, **values: object) -> None:
        """Prints a warning and adds its event."""
        self.logger.warn(self.step, message, **values)


def find_batch_size(plan: RunPlan, runner: StepRunner, accelerator: Accelerator) -> int:
    """The largest micro-batch of `train.accumulate` samples that fits, equal on all processes.

    Each trial is a forward and backward pass over copies of the largest image. It draws from no ambient
    random state and leaves no gradient. Raises OutOfMemoryError if not even one image fits.
    """
    views = [(record, crop) for record in plan.index.records for crop in plan.buckets.crops[record.name]]
    record, crop = max(views, key=lambda view: view[1].size.area)
    for size in halving_divisors(plan.config.train.accumulate):
        samples = [Sample(index, record, crop, record.caption) for index in range(size)]
        if all_reduce_count(accelerator, _fits(runner, samples)) == accelerator.num_processes:
            return size
    raise torch.OutOfMemoryError("not even one image fits")


def halving_divisors(number: int) -> Iterator[int]:
    """Divisors of a number, from itself down, each at most half of the one before."""
    size = number
    while size:
        if number % size == 0:
            yield size
            size //= 2
        else:
            size -= 1


def _fits(runner: StepRunner, samples: Sequence[Sample]) -> bool:
    """Whether a micro-batch fits beside the tensors that the optimizer will add."""
    fits = False
    with suppress(torch.OutOfMemoryError), as_out_of_memory():
        moments: list[Tensor] = [torch.empty_like(p) for p in runner.parameters for _ in range(NUM_MOMENTS)]
        runner.forward_backward(0, samples, len(samples))
        fits = bool(moments)
    moments = []
    runner.optimizer.zero_grad(set_to_none=True)
    clear_device_cache()
    return fits
