"""One optimizer step: draw, forward and backward by micro-batches, clip, update.

B batch, C channels, H W latent size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from sdlora.config import TrainSection
from sdlora.data.batches import Sample, split_micro_batches
from sdlora.diffusion.objective import denoising_loss, draw
from sdlora.lora.adapter import NormReport, limit_norms
from sdlora.models.conditioning import Condition
from sdlora.models.dtypes import Precision
from sdlora.seeds import derive_seed
from sdlora.training.distributed import all_reduce_sum
from sdlora.training.ema import EMA, kept
from sdlora.training.optimizer import build_optimizer, group_parameters
from sdlora.training.prepare import Prepared


@dataclass(frozen=True)
class Draw:
    """One sample of a step, as it was drawn: the data's half of exact resume."""

    index: int
    image: str
    caption: str
    noise_seed: int
    timestep: int


@dataclass(frozen=True)
class Gradient:
    """What a step's backward passes left.

    Args:
        loss: Mean over the samples of the step, on all processes.
        norm: Of the gradient, before clipping.
        draws: This process's samples.
    """

    loss: float
    norm: float
    draws: tuple[Draw, ...]

    @property
    def is_finite(self) -> bool:
        """Whether an update by it makes sense."""
        return math.isfinite(self.loss) and math.isfinite(self.norm)


class StepRunner:
    """The trainable adapter and its optimizer, on one process or many."""

    def __init__(
        self, settings: TrainSection, prepared: Prepared, accelerator: Accelerator, precision: Precision
    ) -> None:
        self.settings = settings
        self.prepared = prepared
        self.accelerator = accelerator
        self.precision = precision
        self.adapter = prepared.adapter
        # A list, made once: an iterator that is used up clips nothing.
        self.parameters: list[Tensor] = self.adapter.parameters()
        self.norms: NormReport | None = None
        self.groups = group_parameters(self.adapter.named_tensors(), settings)
        self.optimizer = accelerator.prepare_optimizer(build_optimizer(settings, self.groups))
        self.optimizer.train()
        decay = settings.ema_decay
        self.ema = EMA(self.adapter.named_tensors(), decay) if decay else None

    def compute_gradients(self, step: int, samples: list[Sample], *, dropout: bool = True) -> Gradient:
        """Leaves the clipped gradient of the mean loss, summed over micro-batches and processes.

        Args:
            step: Seeds the draws.
            samples: Of the whole step, on all processes.
            dropout: Whether the adapter's dropout is on, where it has one.
        """
        total = torch.zeros((), device=self.accelerator.device)
        draws: list[Draw] = []
        micro_batches = split_micro_batches(
            samples,
            batch_size=self.settings.micro_batch,
            process_index=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
        )
        for micro_batch in filter(None, micro_batches):
            loss, drawn = self.forward_backward(step, micro_batch, len(samples), dropout=dropout)
            total += loss
            draws += drawn
        if self.accelerator.num_processes > 1:
            total = self._exchange(total)
        return Gradient(float(total), self._clip(), tuple(draws))

    def forward_backward(
        self, step: int, micro_batch: list[Sample], count: int, *, dropout: bool = True
    ) -> tuple[Tensor, list[Draw]]:
        """Forward and backward pass of a micro-batch: its share of the loss of a step, and what was drawn.

        Args:
            step: Seeds the draws.
            micro_batch: Of this process.
            count: Samples of the whole step.
            dropout: As in `compute_gradients`.
        """
        seeds = self._seeds("dropout", step, micro_batch) if dropout else []
        with self.prepared.dropout.drawn(seeds):
            losses, drawn = self._losses(step, micro_batch)
            loss = losses.sum() / count
            self.accelerator.backward(loss)
        return loss.detach(), drawn

    def _seeds(self, purpose: str, step: int, samples: list[Sample]) -> list[int]:
        return [derive_seed(purpose, self.settings.seed, step, sample.index) for sample in samples]

    def _losses(self, step: int, samples: list[Sample]) -> tuple[Tensor, list[Draw]]:
        """The loss of each sample, (B,), and what was drawn for it."""
        encodings, device = self.prepared.encodings, self.accelerator.device
        seeds = self._seeds("sample", step, samples)
        views = [(sample.record, sample.crop) for sample in samples]
        posteriors = [encodings.posterior(*view) for view in views]
        drawn = draw(self.prepared.objective, posteriors, seeds)
        condition = encodings.conditions([sample.caption for sample in samples], views).to(device)
        losses = denoising_loss(
            lambda noisy, timesteps: self.denoise(noisy, timesteps, condition),
            self.prepared.objective,
            drawn.to(device),
        )
        return losses, [
            Draw(sample.index, sample.record.name, sample.caption, seed, int(timestep))
            for sample, seed, timestep in zip(samples, seeds, drawn.timesteps, strict=True)
        ]

    def denoise(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """The UNet's answer to noisy latents (B, C, H, W), timesteps (B,) and their condition."""
        with self._autocast():
            return self.prepared.base.denoise(noisy, timesteps, condition)

    def _autocast(self) -> AbstractContextManager[None]:
        # A base that is stored in the compute dtype needs no casts.
        if self.precision.compute == self.precision.base:
            return nullcontext()
        context: AbstractContextManager[None] = self.accelerator.autocast()
        return context

    def _exchange(self, loss: Tensor) -> Tensor:
        """Sums all gradients and the loss over the processes, in one exchange of the adapter's bytes.

        A process without samples takes part with zeros.
        """
        if self.accelerator.scaler is not None:
            # It has no scale until it has scaled something, which a process without samples did not.
            self.accelerator.scaler.scale(loss)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        own = torch.cat([*(gradient.flatten() for gradient in gradients), loss.flatten()])
        sizes = [parameter.numel() for parameter in self.parameters]
        parts: list[Tensor] = list(all_reduce_sum(self.accelerator, own).split([*sizes, 1]))
        for parameter, part in zip(self.parameters, parts[:-1], strict=True):
            parameter.grad = part.view_as(parameter)
        return parts[-1].reshape(())

    def _clip(self) -> float:
        """Clips the gradients in place; returns their norm before."""
        limit = self.settings.grad_clip or math.inf
        return float(self.accelerator.clip_grad_norm_(self.parameters, limit))

    @contextmanager
    def inference_weights(self) -> Iterator[None]:
        """The adapter as it is meant to be used, while it is looked at or saved.

        With `train.ema_decay` that is the moving average of the trained values.
        A schedule-free optimizer (Defazio et al. 2024, 2405.15682) trains at another point than the average
        that it is after, and moves the parameters to it by `eval()`. Copies bring them back to the bit.
        """
        if self.ema is not None:
            with self.ema.swapped_in():
                yield
            return
        if not hasattr(self.optimizer.optimizer, "eval"):
            yield
            return
        with kept(self.parameters):
            self.optimizer.eval()
            try:
                yield
            finally:
                self.optimizer.train()

    def rates(self, rate: float) -> dict[str, float]:
        """The learning rate of each group at a base rate."""
        return {group.name: rate * group.ratio for group in self.groups}

    def update(self, rate: float, *, skip: bool) -> None:
        """Changes the adapter by its gradient, and forgets the gradient."""
        for group, own in zip(self.optimizer.param_groups, self.rates(rate).values(), strict=True):
            group["lr"] = own
        # A gradient scaler skips by itself, and must see what is not finite to lower its scale.
        if not skip or self.accelerator.scaler is not None:
            self.optimizer.step()
            if self.prepared.max_norm:
                self.norms = limit_norms(self.adapter, self.prepared.max_norm)
            if self.ema is not None and not skip:
                self.ema.update()
        self.optimizer.zero_grad(set_to_none=True)
