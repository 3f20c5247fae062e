"""Checks that stop a run whose numbers no later step can repair."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdlora.errors import TrainingDiverged
from sdlora.lora.adapter import Adapter

NUM_ZERO_LOSSES = 5
EMA = 0.98


@dataclass
class Counters:
    """How far a run is; a checkpoint keeps it whole.

    Args:
        step: Optimizer steps done.
        images_seen: Samples in them.
        loss_ema: Running mean of the loss.
        skipped: Steps whose update was skipped.
        skipped_in_row: The newest of them without a good step in between.
        zeros_in_row: The newest steps whose loss was exactly 0.
    """

    step: int = 0
    images_seen: int = 0
    loss_ema: float | None = None
    skipped: int = 0
    skipped_in_row: int = 0
    zeros_in_row: int = 0

    def count(self, loss: float, *, is_good: bool) -> None:
        """Notes how a step went."""
        if math.isfinite(loss):
            ema = self.loss_ema
            self.loss_ema = loss if ema is None else EMA * ema + (1 - EMA) * loss
        self.zeros_in_row = self.zeros_in_row + 1 if loss == 0 else 0
        self.skipped_in_row = 0 if is_good else self.skipped_in_row + 1
        self.skipped += not is_good


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


def check_parameters(adapter: Adapter, situation: str) -> None:
    """Stops when a trained value is not finite.

    Raises:
        TrainingDiverged: Naming the modules.
    """
    bad = [
        name
        for name, pair in adapter.modules.items()
        if not (torch.isfinite(pair.down).all() and torch.isfinite(pair.up).all())
    ]
    if bad:
        raise TrainingDiverged(
            f"{len(bad)} modules hold values that are not finite, such as {bad[0]}; "
            f"lower train.learning_rate ({situation})"
        )


def copy_ups(adapter: Adapter) -> list[Tensor]:
    """The up matrices as they are now."""
    return [pair.up.detach().clone() for pair in adapter.modules.values()]


def find_dead_modules(adapter: Adapter, ups_before: Sequence[Tensor]) -> list[str]:
    """The modules whose up matrix did not change in the first update."""
    pairs = adapter.modules.items()
    return [
        name for (name, pair), before in zip(pairs, ups_before, strict=True) if torch.equal(pair.up, before)
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
