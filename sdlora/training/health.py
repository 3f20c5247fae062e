"""Health checks after each step: what no later step can repair stops the run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from sdlora.errors import TrainingDiverged, join_names
from sdlora.lora.adapter import Adapter
from sdlora.runs import RunFolder
from sdlora.training.plan import RunPlan
from sdlora.training.step import StepResult

MAX_ZERO_LOSSES = 5
LOSS_EMA_DECAY = 0.98


@dataclass
class Counters:
    """Progress of a run, as checkpoints keep it."""

    step: int = 0
    images_seen: int = 0
    loss_ema: float | None = None  # mean of about the last 50 losses
    skipped: int = 0  # steps without an update, since loss or gradient were not finite
    skipped_in_row: int = 0
    zeros_in_row: int = 0  # latest steps with a loss of exactly 0

    @classmethod
    def restore(cls, values: Mapping[str, Any]) -> Counters:
        """The inverse of `dataclasses.asdict`; checkpoints of older versions have more."""
        return cls(**{one.name: values[one.name] for one in fields(cls)})

    def count(self, result: StepResult) -> None:
        """Counts a step."""
        self.step = result.step
        self.images_seen += len(result.images)
        self.skipped_in_row = 0 if result.updated else self.skipped_in_row + 1
        self.skipped += not result.updated
        if math.isfinite(result.loss):
            # A plain mean at first: else the loss of the first step alone would dominate for long.
            weight = max(1 / max(self.step - self.skipped, 1), 1 - LOSS_EMA_DECAY)
            previous = result.loss if self.loss_ema is None else self.loss_ema
            self.loss_ema = previous + weight * (result.loss - previous)
        self.zeros_in_row = self.zeros_in_row + 1 if result.loss == 0 else 0


class Health:
    """Checks every step once it is done; `warn` takes a message."""

    def __init__(self, run: RunFolder, plan: RunPlan, adapter: Adapter, warn: Callable[..., None]) -> None:
        self.run, self.plan, self.adapter, self.warn = run, plan, adapter, warn
        self.restore(Counters())

    def restore(self, counters: Counters) -> None:
        """Continues from the counters of a checkpoint."""
        self.counters = counters
        # In fp16 the first steps are skipped until the scale fits: the proof waits for the first update.
        is_new = counters.skipped == counters.step
        self.first_update_step = self.plan.first_update_step(counters.step if is_new else 0)
        self._keep_initial_values()

    @property
    def checks_first_update(self) -> bool:
        """Whether the next update must change every module."""
        return self._initial is not None

    def check(self, result: StepResult) -> None:
        """Counts a step and checks its numbers; raises TrainingDiverged if the run cannot recover."""
        self.counters.count(result)
        self._check_counters(result)
        self._check_parameters(result)
        if self._initial is not None:
            self._check_first_update(result, self._initial)
        self._keep_initial_values()

    def _check_counters(self, result: StepResult) -> None:
        if self.counters.zeros_in_row >= MAX_ZERO_LOSSES:
            problem = f"the loss was exactly 0 for {MAX_ZERO_LOSSES} steps, so nothing is learned"
            remedy = f"check the base and train.precision ({self._describe(result)})"
            raise TrainingDiverged(f"{problem}; {remedy}", key="zero-loss")
        if self.counters.skipped_in_row >= self.plan.config.train.max_skipped_steps:
            problem = f"loss or gradient was not finite for {self.counters.skipped_in_row} steps in a row"
            remedy = f"lower train.learning_rate or set train.precision=bf16 ({self._describe(result)})"
            raise TrainingDiverged(f"{problem}; {remedy}", key="non-finite-steps")

    def _check_parameters(self, result: StepResult) -> None:
        # One number for all tensors, so that the device is asked once.
        if torch.isfinite(torch.stack(torch._foreach_norm(self.adapter.parameters()))).all():
            return
        if bad := [name for name, module in self.adapter.modules.items() if not module.is_finite]:
            problem = f"{len(bad)} modules have non-finite values: {join_names(bad)}"
            remedy = f"lower train.learning_rate ({self._describe(result)})"
            raise TrainingDiverged(f"{problem}; {remedy}", key="non-finite-parameters")

    def _keep_initial_values(self) -> None:
        """Copies what the first update must change, if that comes next."""
        self._initial: list[Tensor] | None = None
        if self.counters.step == self.first_update_step:
            modules = self.adapter.modules.values()
            self._initial = [module.starting_at_zero.detach().clone() for module in modules]

    def _check_first_update(self, result: StepResult, initial: Sequence[Tensor]) -> None:
        if not result.updated:
            self.first_update_step = self.plan.first_update_step(result.step)
            return
        pairs = zip(self.adapter.modules.items(), initial, strict=True)
        dead = [name for (name, module), before in pairs if torch.equal(module.starting_at_zero, before)]
        if excused := check_dead_modules(dead, self._has_single_token(result.step)):
            self.warn(f"{len(excused)} modules cannot learn: self-attention over a single token")

    def _has_single_token(self, step: int) -> bool:
        """Whether the coarsest level of the base sees the images of a step as a single position."""
        size, info = self.plan.order.step(step - 1)[0].crop.size, self.plan.info
        side = info.coarsest_px
        return size.width <= side and size.height <= side

    def _describe(self, result: StepResult) -> str:
        # A checkpoint from among the skipped steps contains what makes them fail.
        good = result.step - self.counters.skipped_in_row
        steps = [step for step in self.run.checkpoint_steps() if step <= good]
        last = f"last good checkpoint: {self.run.checkpoint(steps[-1])}" if steps else "no checkpoint yet"
        return (
            f"step {result.step}, loss {result.loss:g}, gradient norm {result.grad_norm:g}, learning rate "
            f"{result.learning_rate:g}, images {', '.join(result.images)}; {last}"
        )


def check_dead_modules(dead: Sequence[str], has_single_token: bool) -> list[str]:
    """Raises TrainingDiverged for modules that the first update did not change; returns the excused ones.

    Queries and keys of a self-attention over a single token receive no gradient: its softmax is always 1.
    """
    learns = [name for name in dead if ".attn1." not in name or not name.endswith((".to_q", ".to_k"))]
    if wrong := learns if has_single_token else dead:
        problem = f"{len(wrong)} modules did not change in the first update: {join_names(wrong)}"
        raise TrainingDiverged(f"{problem}; check lora.targets", key="dead-modules")
    return list(dead)
