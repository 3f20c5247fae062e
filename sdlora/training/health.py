"""Checks that stop a run whose numbers no later step can repair."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sdlora.errors import TrainingDiverged
from sdlora.lora.adapter import Adapter

NUM_ZERO_LOSSES = 5
EMA = 0.98
# A value is far if its logarithm is so many deviations above the mean of about the last 100, at least 30.
FAR, LEAST_DEVIATION = 6.0, 0.1
SPREAD, LEAST_COUNT = 0.99, 30


@dataclass
class RunningStats:
    """Where the logarithms of a positive number lie: a loss, or a norm, varies by factors.

    Args:
        count: Values so far.
        mean: Of their logarithms, the older the less.
        variance: Likewise.
    """

    count: int = 0
    mean: float = 0.0
    variance: float = 0.0

    @property
    def limit(self) -> float:
        """Logarithms above it are far outside."""
        if self.count < LEAST_COUNT:
            return math.inf
        return self.mean + FAR * max(math.sqrt(self.variance), LEAST_DEVIATION)

    def take(self, value: float) -> bool:
        """Takes a value in, and says whether it lies far above those before."""
        if not (value > 0 and math.isfinite(value)):
            return False
        own = math.log(value)
        is_far = own > self.limit
        self.count += 1
        weight = max(1 / self.count, 1 - SPREAD)
        # Something far may move the distribution, but not make it wide at once.
        delta = min(own, self.limit) - self.mean
        self.mean += weight * delta
        self.variance = (1 - weight) * (self.variance + weight * delta**2)
        return is_far


@dataclass
class Counters:
    """How far a run is; a checkpoint keeps it whole.

    Args:
        step: Optimizer steps done.
        images_seen: Samples in them.
        loss_ema: Mean of about the last 50 losses.
        skipped: Steps whose update was skipped.
        skipped_in_row: The newest of them without a good step in between.
        zeros_in_row: The newest steps whose loss was exactly 0.
        losses: How the loss is distributed.
        norms: How the gradient's norm is.
    """

    step: int = 0
    images_seen: int = 0
    loss_ema: float | None = None
    skipped: int = 0
    skipped_in_row: int = 0
    zeros_in_row: int = 0
    losses: RunningStats = field(default_factory=RunningStats)
    norms: RunningStats = field(default_factory=RunningStats)

    @classmethod
    def restore(cls, values: Mapping[str, Any]) -> Counters:
        """From what `asdict` gave."""
        spreads = {name: RunningStats(**values[name]) for name in ("losses", "norms")}
        return cls(**{**values, **spreads})

    def count(self, loss: float, norm: float, *, is_good: bool) -> list[str]:
        """Notes how a step went.

        Returns:
            What was far outside the run's own distribution, in words.
        """
        far = [
            f"{name} {value:.3g} where {math.exp(usual):.3g} is usual"
            for name, value, spread, usual in (
                ("loss", loss, self.losses, self.losses.mean),
                ("gradient norm", norm, self.norms, self.norms.mean),
            )
            if spread.take(value)
        ]
        if math.isfinite(loss):
            ema = self.loss_ema
            # A plain mean at first: else the first loss, which is of one step, would weigh the most for long.
            weight = max(1 / max(self.losses.count, 1), 1 - EMA)
            self.loss_ema = loss if ema is None else ema + weight * (loss - ema)
        self.zeros_in_row = self.zeros_in_row + 1 if loss == 0 else 0
        self.skipped_in_row = 0 if is_good else self.skipped_in_row + 1
        self.skipped += not is_good
        return far


def check_counters(counters: Counters, max_skipped: int, situation: str) -> None:
    """Stops after too many bad steps in a row, or several losses of exactly 0.

    Args:
        counters: After the step was counted.
        max_skipped: `train.max_skipped_steps`.
        situation: What the step was, and where to go on from.

    Raises:
        TrainingDiverged: With both.
    """
    if counters.zeros_in_row >= NUM_ZERO_LOSSES:
        raise TrainingDiverged(
            f"the loss was exactly 0 for {NUM_ZERO_LOSSES} steps: nothing is learnt; "
            f"check the base and train.precision ({situation})"
        )
    if counters.skipped_in_row >= max_skipped:
        raise TrainingDiverged(
            f"loss or gradient was not finite for {counters.skipped_in_row} steps in a row; "
            f"lower train.learning_rate or use train.precision=bf16 ({situation})"
        )


def is_finite(parameters: Sequence[Tensor]) -> bool:
    """Whether all values are numbers; one look at the device for all of them."""
    norms = torch.stack(torch._foreach_norm(list(parameters)))
    return bool(torch.isfinite(norms).all())


def check_parameters(adapter: Adapter, situation: str) -> None:
    """Stops when a trained value is not finite.

    Raises:
        TrainingDiverged: Naming the modules.
    """
    bad = [name for name, module in adapter.modules.items() if not module.is_finite]
    if bad:
        raise TrainingDiverged(
            f"{len(bad)} modules hold values that are not finite, such as {bad[0]}; "
            f"lower train.learning_rate ({situation})"
        )


def copy_starts(adapter: Adapter) -> list[Tensor]:
    """What the first update must change, as it is now: of low-rank modules the up matrices."""
    return [module.starting_at_zero.detach().clone() for module in adapter.modules.values()]


def find_dead_modules(adapter: Adapter, before: Sequence[Tensor]) -> list[str]:
    """The modules that the first update did not change."""
    return [
        name
        for (name, module), start in zip(adapter.modules.items(), before, strict=True)
        if torch.equal(module.starting_at_zero, start)
    ]


def check_dead_modules(dead: Sequence[str], is_single_token: bool) -> list[str]:
    """Stops for dead modules; gives back those that are only worth a warning.

    Queries and keys of a self-attention over a single token cannot receive a gradient: its softmax
    is 1 whatever they are.

    Raises:
        TrainingDiverged: Naming the modules that should have changed.
    """
    excused = [
        name for name in dead if is_single_token and ".attn1." in name and name.endswith((".to_q", ".to_k"))
    ]
    wrong = [name for name in dead if name not in excused]
    if wrong:
        raise TrainingDiverged(
            f"{len(wrong)} modules did not change in the first step: {', '.join(wrong[:5])}"
            f"{' …' if len(wrong) > 5 else ''}; check lora.targets"
        )
    return excused
