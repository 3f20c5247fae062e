"""The training loop: step, record, evaluate, save, sample.

B batch, C channels, H W latent size, L tokens, D width.
"""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import psutil
import torch
from accelerate import Accelerator
from torch import Tensor

from sdlora.data.batches import Sample, deal
from sdlora.diffusion.objective import denoising_loss, derive_seed, draw
from sdlora.errors import RunError, RunStopped
from sdlora.evaluation.heldout import HeldoutLoss, heldout_loss
from sdlora.export import export_adapter
from sdlora.lora.metadata import run_metadata
from sdlora.runs import RunFolder
from sdlora.training.checkpoint import read_checkpoint, restore_optimizer, save_checkpoint
from sdlora.training.console import Report
from sdlora.training.device import Precision
from sdlora.training.facts import describe_run
from sdlora.training.guards import LossGuard, check_dead_modules, check_parameters, find_dead_modules
from sdlora.training.optimizer import build_optimizer, learning_rate
from sdlora.training.plan import RunPlan
from sdlora.training.prepare import Prepared
from sdlora.training.samples import log_grid, sample_step
from sdlora.training.stop import StopSignals

EMA = 0.98


@dataclass(frozen=True)
class Draw:
    """One sample of a step, as it was drawn: the data's half of exact resume."""

    index: int
    image: str
    caption: str
    noise_seed: int
    timestep: int


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
        self.prepared = prepared
        # where it runs
        self.accelerator = accelerator
        self.precision = precision
        self.report = report
        # what is trained: a list, since an iterator that is used up clips nothing
        self.adapter = prepared.adapter
        self.parameters: list[Tensor] = self.adapter.parameters()
        self.optimizer = accelerator.prepare_optimizer(build_optimizer(self.settings, self.parameters))
        # how far it is
        self.step = 0
        self.images_seen = 0
        self.loss_ema: float | None = None
        self.guard = LossGuard(self.settings.max_skipped_steps)

    def train(self) -> None:
        """Runs the remaining steps; a signal ends the run after the step it came in."""
        self.report.say("training")
        with StopSignals() as signals, self.report.progress("training", self.plan.steps, self.step) as meter:
            if self.step == 0:
                self.evaluate_if_due()
            while self.step < self.plan.steps:
                started = time.monotonic()
                result = self.train_step()
                self.record(result, time.monotonic() - started)
                meter.advance(note=f"loss {self.loss_ema or math.nan:.4f}")
                stopping = self.is_stopping(signals)
                self.evaluate_if_due()
                self.save_if_due(stopping)
                if stopping:
                    raise self.stopped(signals.received)
                self.sample_if_due()

    def train_step(self) -> StepResult:
        """One optimizer update: draw, forward and backward by micro-batches, clip, update."""
        rate = learning_rate(self.step, self.settings, self.plan.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        samples = self.plan.order.step(self.step)
        loss, draws = self._accumulate(samples)
        grad_norm = self._clip()
        self.images_seen += len(samples)
        names = [sample.record.name for sample in samples]
        may_update = self.guard.check(self.step + 1, loss, grad_norm, rate, names, self._last_good())
        ups = [pair.up.detach().clone() for pair in self.adapter.modules.values()] if self.step == 0 else None
        # A scaler skips the update by itself, and must see it to lower its scale.
        if may_update or self.accelerator.scaler is not None:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if may_update and ups is not None:
            self._check_first_step(ups, samples)
        return StepResult(self.step, loss, rate, grad_norm, may_update, tuple(draws))

    def _accumulate(self, samples: list[Sample]) -> tuple[float, list[Draw]]:
        """Gradients of the step's mean loss, summed over micro-batches and processes."""
        total = torch.zeros((), device=self.accelerator.device)
        draws: list[Draw] = []
        micro_batches = deal(
            samples,
            batch_size=self.settings.batch_size or 1,
            process_index=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
        )
        for micro_batch in micro_batches:
            if not micro_batch:
                continue
            losses, drawn = self._losses(micro_batch)
            loss = losses.sum() / len(samples)
            self.accelerator.backward(loss)
            total += loss.detach()
            draws += drawn
        if self.accelerator.num_processes > 1:
            total = self.accelerator.reduce(total, "sum")
            self._sum_gradients()
        return float(total), draws

    def _losses(self, samples: list[Sample]) -> tuple[Tensor, list[Draw]]:
        """The loss of each sample, (B,), and what was drawn for it."""
        encodings, device = self.prepared.encodings, self.accelerator.device
        seeds = [derive_seed("sample", self.settings.seed, self.step, sample.index) for sample in samples]
        posteriors = [encodings.posterior(sample.record, sample.crop) for sample in samples]
        drawn = draw(self.prepared.objective, posteriors, seeds)
        hidden = torch.stack([encodings.hidden(sample.caption) for sample in samples]).to(device)
        losses = denoising_loss(
            lambda noisy, timesteps: self.denoise(noisy, timesteps, hidden),
            self.prepared.objective,
            drawn.to(device),
        )
        return losses, [
            Draw(sample.index, sample.record.name, sample.caption, seed, int(timestep))
            for sample, seed, timestep in zip(samples, seeds, drawn.timesteps, strict=True)
        ]

    def denoise(self, noisy: Tensor, timesteps: Tensor, hidden: Tensor) -> Tensor:
        """The UNet's answer to noisy latents (B, C, H, W), timesteps (B,), text states (B, L, D)."""
        with self._autocast():
            return self.prepared.base.denoise(noisy, timesteps, hidden)

    def _autocast(self) -> AbstractContextManager[None]:
        # A base that is stored in the compute dtype needs no casts.
        if self.precision.compute == self.precision.base:
            return nullcontext()
        context: AbstractContextManager[None] = self.accelerator.autocast()
        return context

    def _sum_gradients(self) -> None:
        """One all-reduce of all gradients; a process without samples takes part with zeros."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        flat = self.accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "sum")
        sizes = [parameter.numel() for parameter in self.parameters]
        for parameter, part in zip(self.parameters, flat.split(sizes), strict=True):
            parameter.grad = part.view_as(parameter)

    def _clip(self) -> float:
        """Clips the gradients in place; returns their norm before."""
        limit = self.settings.grad_clip or math.inf
        return float(self.accelerator.clip_grad_norm_(self.parameters, limit))

    def _check_first_step(self, ups: list[Tensor], samples: list[Sample]) -> None:
        size = samples[0].crop.size
        depth = len(self.plan.info.unet_config["block_out_channels"]) - 1
        side = self.plan.info.vae_factor * 2**depth
        is_single_token = size.width <= side and size.height <= side
        excused = check_dead_modules(find_dead_modules(self.adapter, ups), is_single_token)
        if excused:
            self.warn(f"{len(excused)} modules cannot learn: self-attention sees a single token at {size}")

    def record(self, result: StepResult, seconds: float) -> None:
        """Writes the step's event; trackers are told, but cannot stop the run."""
        if math.isfinite(result.loss):
            ema = self.loss_ema
            self.loss_ema = result.loss if ema is None else EMA * ema + (1 - EMA) * result.loss
        values = {
            "loss": result.loss,
            "loss_ema": self.loss_ema,
            "learning_rate": result.learning_rate,
            "grad_norm": result.grad_norm,
            "images_seen": self.images_seen,
            "steps_per_second": round(1 / max(seconds, 1e-9), 3),
            "memory_mb": round(_memory_mb(self.accelerator.device), 1),
        }
        if not result.updated:
            images = [draw.image for draw in result.draws]
            self.warn(
                f"step {result.step} skipped: loss {result.loss:g}, gradient norm {result.grad_norm:g}",
                images=images,
            )
        self.event(
            "step",
            **{name: _json_number(value) for name, value in values.items()},
            skipped=self.guard.skipped,
        )
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
        return heldout_loss(
            self.denoise,
            self.prepared.objective.schedule,
            self.prepared.splits[split],
            batch_size=max(4, self.settings.batch_size or 1),
            device=self.accelerator.device,
        )

    def save_if_due(self, stopping: bool = False) -> None:
        """Saves the adapter, to use, and the state, to continue."""
        saves, samples = self.step in self.plan.save_steps, self.step in self.plan.sample_steps
        if not (saves or samples or stopping):
            return
        check_parameters(self.adapter, self.step, self._last_good())
        if self.accelerator.is_main_process:
            facts = describe_run(self.run, self.plan, step=self.step, images_seen=self.images_seen)
            report = export_adapter(
                self.adapter,
                self.run.step_adapter(self.step),
                precision=self.plan.config.export.precision,
                metadata=run_metadata(facts),
            )
            self.event("saved", path=str(report.path.relative_to(self.run.path)), precision=report.precision)
            if saves or stopping:
                self._save_checkpoint()
        self.accelerator.wait_for_everyone()

    def _save_checkpoint(self) -> None:
        state = {
            "step": self.step,
            "images_seen": self.images_seen,
            "loss_ema": self.loss_ema,
            "skipped": self.guard.skipped,
            "skipped_in_row": self.guard.skipped_in_row,
            "zeros_in_row": self.guard.zeros_in_row,
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
            "dataset_digest": self.plan.index.digest,
            "base_digest": self.plan.info.digest,
        }
        try:
            save_checkpoint(
                self.run.checkpoint(self.step),
                tensors=self._named_tensors(),
                optimizer=self.optimizer.state_dict(),
                state=state,
            )
        except OSError as error:
            self.warn(f"the state of step {self.step} could not be saved ({error}); the run goes on")
            return
        self.run.remove_checkpoints(keep=self.settings.keep_checkpoints)

    def _named_tensors(self) -> dict[str, Tensor]:
        return {
            f"{name}.{part}": getattr(pair, part)
            for name, pair in self.adapter.modules.items()
            for part in ("down", "up")
        }

    def resume(self) -> None:
        """Continues from the newest complete state; starts at step 0 if there is none.

        Raises:
            RunError: If pictures, captions or the base are not those of the run.
        """
        for step in reversed(self.run.checkpoint_steps()):
            try:
                tensors, optimizer, state = read_checkpoint(self.run.checkpoint(step))
            except RunError as error:
                self.report.warn(f"{error}; trying the one before")
                continue
            for key, value, what in (
                ("dataset_digest", self.plan.index.digest, "the pictures or captions"),
                ("base_digest", self.plan.info.digest, "the base"),
            ):
                if state[key] != value:
                    raise RunError(
                        f"{what} changed since {self.run.path} was started; start a new run with "
                        f"lora.init_from={self.run.adapter}"
                    )
            self._restore(tensors, optimizer, state)
            self.report.say(f"resumed from step {self.step}")
            return
        self.report.say(f"{self.run.path} has no complete checkpoint: starting at step 0")

    def _restore(
        self, tensors: dict[str, Tensor], optimizer: dict[str, object], state: dict[str, object]
    ) -> None:
        own = self._named_tensors()
        if set(own) != set(tensors):
            raise RunError(
                f"the checkpoint in {self.run.path} adapts other modules than lora.targets; start a new run"
            )
        for name, tensor in own.items():
            tensor.data.copy_(tensors[name])
        restore_optimizer(self.optimizer, optimizer)
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.images_seen = int(str(state["step"])), int(str(state["images_seen"]))
        self.loss_ema = None if state["loss_ema"] is None else float(str(state["loss_ema"]))
        for counter in ("skipped", "skipped_in_row", "zeros_in_row"):
            setattr(self.guard, counter, int(str(state[counter])))

    def sample_if_due(self) -> None:
        """Makes a grid of the adapter as saved; running out of memory skips it."""
        if self.step not in self.plan.sample_steps:
            return
        try:
            grid = sample_step(self.run, self.plan, self.prepared, self.step, self.accelerator, self.report)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
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
        if self.accelerator.num_processes == 1:
            return received
        flag = torch.tensor(float(received), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum") > 0)

    def stopped(self, signal_number: int | None) -> RunStopped:
        """What is raised after the state was saved."""
        message = f"stopped at step {self.step} of {self.plan.steps}; `sdlora resume {self.run.path}` goes on"
        return RunStopped(message, signal_number or 15)

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
        return (
            f"the last good checkpoint is {self.run.checkpoint(steps[-1])}"
            if steps
            else "no checkpoint was saved yet"
        )


def _json_number(value: float | None) -> float | str | None:
    """JSON has no NaN and no infinity."""
    return value if value is None or math.isfinite(value) else str(value)


def _memory_mb(device: torch.device) -> float:
    """Memory in use: peak on CUDA, else that of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return float(psutil.Process().memory_info().rss) / 1e6
