"""One optimizer step: draws, forward and backward passes by micro-batch, clipping, update.

B batch, C channels, H W latent size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from sdlora.config import TrainSection
from sdlora.data.batches import Sample, split_micro_batches
from sdlora.data.captions import without_trigger
from sdlora.diffusion.objective import (
    BaseDenoiser,
    Denoiser,
    Draws,
    denoising_loss,
    draw,
    layout_samples,
    prior_loss,
)
from sdlora.dtypes import Precision
from sdlora.lora.adapter import NormReport, limit_norms
from sdlora.lora.attach import unmounted
from sdlora.lora.layers import lora_layers
from sdlora.models.base import Condition
from sdlora.seeds import derive_seed
from sdlora.training.distributed import all_reduce_sum
from sdlora.training.optimizer import build_optimizer, group_parameters
from sdlora.training.prepare import Prepared


@dataclass(frozen=True)
class Draw:
    """The random choices of one sample in a step."""

    index: int
    image: str
    caption: str
    noise_seed: int
    timestep: int


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """One optimizer step of all processes."""

    step: int  # from 1
    loss: float  # mean over the samples
    learning_rate: float  # before the ratios of parameter groups
    grad_norm: float  # before clipping
    updated: bool  # False if the update was skipped, since loss or gradient were not finite
    images: tuple[str, ...]
    draws: tuple[Draw, ...]  # of this process
    rates: Mapping[str, float]  # learning rate of each parameter group
    norms: NormReport | None = None  # of the adapter's modules, with lora.max_norm


class EMA:
    """An exponential moving average of the trained tensors, without their initial values.

    After t updates, the value of i updates ago has the weight `decay**i (1 - decay) / (1 - decay**t)`: the
    bias correction of Adam (Kingma and Ba 2015, 1412.6980, section 3). A short run is averaged as a whole.
    """

    def __init__(self, tensors: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.num_updates = 0
        self.trained = tensors
        self.values = {name: tensor.detach().clone() for name, tensor in tensors.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Adds the current values of the tensors."""
        self.num_updates += 1
        weight = (1 - self.decay) / (1 - self.decay**self.num_updates)
        torch._foreach_lerp_(list(self.values.values()), list(self.trained.values()), weight)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The tensors hold their average inside, and their own values again afterwards, to the bit."""
        with preserved(list(self.trained.values())):
            for name, tensor in self.trained.items():
                tensor.data.copy_(self.values[name])
            yield

    def restore(self, values: Mapping[str, Tensor], num_updates: int) -> None:
        self.num_updates = num_updates
        for name, value in self.values.items():
            value.copy_(values[name])


@contextmanager
def preserved(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Restores tensors afterwards, to the bit."""
    copies = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    finally:
        for tensor, copy in zip(tensors, copies, strict=True):
            tensor.data.copy_(copy)


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
        tensors = self.adapter.named_tensors()
        self.parameters: list[Tensor] = list(tensors.values())
        self.layers = lora_layers(prepared.base.components)
        self.norms: NormReport | None = None
        # The update that proves that each module learns is without what could keep one from it:
        # dropout, and the base's own prediction as the target, which a new adapter fits already.
        self.checks_first_update = False
        self.groups = group_parameters(tensors, settings)
        self.optimizer = accelerator.prepare_optimizer(build_optimizer(settings, self.groups))
        self.optimizer.train()
        self.ema = EMA(tensors, settings.ema_decay) if settings.ema_decay else None

    def set_learning_rate(self, rate: float) -> dict[str, float]:
        """Sets the base rate; returns the rate of each group, its own multiple of it."""
        for group, own in zip(self.optimizer.param_groups, self.groups, strict=True):
            group["lr"] = rate * own.ratio
        return {own.name: rate * own.ratio for own in self.groups}

    def compute_gradients(self, step: int, samples: Sequence[Sample]) -> tuple[Tensor, tuple[Draw, ...]]:
        """Computes the gradient of the mean loss over the samples of a step, on all processes.

        Returns the loss of the whole step, on the device, and the draws of this process.
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
            loss, drawn = self.forward_backward(step, micro_batch, len(samples))
            total += loss
            draws += drawn
        if self.accelerator.num_processes > 1:
            total = self._all_reduce(total)
        return total, tuple(draws)

    def forward_backward(
        self, step: int, micro_batch: Sequence[Sample], count: int
    ) -> tuple[Tensor, list[Draw]]:
        """Forward and backward pass of a micro-batch of a step with `count` samples on all processes.

        Returns the micro-batch's share of the loss, and its draws.
        """
        seeds = [] if self.checks_first_update else self._seeds("dropout", step, micro_batch)
        with self.prepared.dropout.drawn(seeds):
            losses, drawn = self._losses(step, micro_batch)
            loss = losses.sum() / count
            self.accelerator.backward(loss)
        if self.prepared.objective.settings.prior_weight:
            loss = loss.detach() + self._preserve(step, micro_batch, count)
        return loss.detach(), drawn

    def _seeds(self, purpose: str, step: int, samples: Sequence[Sample]) -> list[int]:
        return [derive_seed(purpose, self.settings.seed, step, sample.index) for sample in samples]

    def _losses(self, step: int, samples: Sequence[Sample]) -> tuple[Tensor, list[Draw]]:
        """The loss of each sample, (B,), and its draws."""
        objective, device = self.prepared.objective, self.accelerator.device
        drawn = self._draw(step, samples)
        masks = self.prepared.encodings.masks([(sample.record, sample.crop) for sample in samples])
        captions = [sample.caption for sample in samples]
        losses = denoising_loss(
            self._denoiser(captions, samples),
            objective,
            drawn.to(device),
            None if masks is None else masks.to(device),
            self._base_denoiser(captions, samples),
            layout_samples(drawn, objective.settings),
        )
        weights = [self._weight(sample) for sample in samples]
        if any(weight != 1 for weight in weights):
            losses = losses * torch.tensor(weights, device=device)
        return losses, [
            Draw(sample.index, sample.record.name, sample.caption, seed, timestep)
            for sample, seed, timestep in zip(
                samples, self._seeds("sample", step, samples), drawn.timesteps.tolist(), strict=True
            )
        ]

    def _weight(self, sample: Sample) -> float:
        """The weight of a sample's image; prior prediction keeps dropped captions free of the style too."""
        is_prior = self.prepared.objective.settings.prior_weight and sample.record.trigger
        return 0.0 if is_prior and not sample.caption else sample.record.weight

    def _preserve(self, step: int, micro_batch: Sequence[Sample], count: int) -> Tensor:
        """The backward pass of prior prediction for a micro-batch, with its draws; returns its loss."""
        samples = [sample for sample in micro_batch if sample.record.trigger]
        if not samples:
            return torch.zeros((), device=self.accelerator.device)
        objective = self.prepared.objective
        captions = [without_trigger(sample.caption, sample.record.trigger) for sample in samples]
        losses = prior_loss(
            self._denoiser(captions, samples),
            self._base_denoiser(captions, samples),
            objective,
            self._draw(step, samples).to(self.accelerator.device),
        )
        loss = objective.settings.prior_weight * losses.sum() / count
        self.accelerator.backward(loss)
        return loss.detach()

    def _draw(self, step: int, samples: Sequence[Sample]) -> Draws:
        encodings = self.prepared.encodings
        posteriors = [encodings.posterior(sample.record, sample.crop) for sample in samples]
        objective = self.prepared.objective
        return draw(
            objective.without_layout if self.checks_first_update else objective,
            posteriors,
            self._seeds("sample", step, samples),
        )

    def _denoiser(self, captions: Sequence[str], samples: Sequence[Sample]) -> Denoiser:
        views = [(sample.record, sample.crop) for sample in samples]
        condition = self.prepared.encodings.conditions(captions, views).to(self.accelerator.device)
        return lambda noisy, timesteps: self.denoise(noisy, timesteps, condition)

    def _base_denoiser(self, captions: Sequence[str], samples: Sequence[Sample]) -> BaseDenoiser:
        """The same without the trained adapter, on the text encoders too, for some of the samples."""

        @torch.no_grad()
        def denoise_base(noisy: Tensor, timesteps: Tensor, chosen: Sequence[int] | None = None) -> Tensor:
            numbers = range(len(samples)) if chosen is None else chosen
            with unmounted(self.layers, self.adapter):
                own = self._denoiser([captions[one] for one in numbers], [samples[one] for one in numbers])
                return own(noisy, timesteps)

        return denoise_base

    def denoise(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """The base's prediction for noisy latents (B, C, H, W), timesteps (B,) and their condition."""
        # A base stored in the compute dtype needs no casts.
        casts = self.precision.compute != self.precision.base
        with self.accelerator.autocast() if casts else nullcontext():
            return self.prepared.base.denoise(noisy, timesteps, condition)

    def _all_reduce(self, loss: Tensor) -> Tensor:
        """Sums all gradients and the loss over the processes at once; without samples they are zeros."""
        if self.accelerator.scaler is not None:
            # It has no scale until it has scaled something, which a process without samples has not.
            self.accelerator.scaler.scale(loss)
        own = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        total = all_reduce_sum(self.accelerator, torch.cat([tensor.flatten() for tensor in (*own, loss)]))
        *parts, loss = total.split([tensor.numel() for tensor in (*own, loss)])
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)
        return loss.reshape(())

    def clip_gradients(self) -> Tensor:
        """Clips the gradients to `train.grad_clip`; returns their norm before, on the device."""
        limit = self.settings.grad_clip or math.inf
        norm: Tensor = self.accelerator.clip_grad_norm_(self.parameters, limit)
        return norm

    def update(self, *, skip: bool) -> None:
        """Updates the adapter, unless the step is skipped, and clears the gradients."""
        self.norms = None
        # A gradient scaler skips by itself, and must see non-finite gradients to lower its scale.
        if not skip or self.accelerator.scaler is not None:
            self.optimizer.step()
            if self.prepared.max_norm:
                self.norms = limit_norms(self.adapter, self.prepared.max_norm)
            if self.ema is not None and not skip:
                self.ema.update()
        self.optimizer.zero_grad(set_to_none=True)

    @contextmanager
    def inference_weights(self) -> Iterator[None]:
        """The adapter as it is evaluated and saved; the trained values return afterwards, to the bit.

        With `train.ema_decay` it is the moving average. A schedule-free optimizer (Defazio et al. 2024,
        2405.15682) trains at another point than the average it converges to; its `eval()` moves the
        parameters there.
        """
        if self.ema is not None:
            with self.ema.swapped_in():
                yield
        elif hasattr(self.optimizer.optimizer, "eval"):
            with preserved(self.parameters):
                self.optimizer.eval()
                try:
                    yield
                finally:
                    self.optimizer.train()
        else:
            yield
