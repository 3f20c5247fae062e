"""Checks that stop a run whose numbers no later step can repair."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sdlora.errors import TrainingDiverged
from sdlora.lora.adapter import Adapter

NUM_ZERO_LOSSES = 5


class LossGuard:
    """Counts bad steps, and stops when they come in a row.

    Args:
        max_skipped: So many skipped steps in a row are too many.
    """

    def __init__(self, max_skipped: int) -> None:
        self.max_skipped = max_skipped
        self.skipped = 0
        self.skipped_in_row = 0
        self.zeros_in_row = 0

    def check(
        self,
        step: int,
        loss: float,
        grad_norm: float,
        learning_rate: float,
        images: Sequence[str],
        last_good: str,
    ) -> bool:
        """Whether the update of this step may be made.

        Raises:
            TrainingDiverged: After too many bad steps, or several losses of exactly 0.
        """
        self.zeros_in_row = self.zeros_in_row + 1 if loss == 0 else 0
        if self.zeros_in_row >= NUM_ZERO_LOSSES:
            raise TrainingDiverged(
                f"the loss was exactly 0 for {NUM_ZERO_LOSSES} steps up to step {step}: nothing is learnt; "
                "check the base and train.precision"
            )
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.skipped_in_row = 0
            return True
        self.skipped += 1
        self.skipped_in_row += 1
        if self.skipped_in_row >= self.max_skipped:
            raise TrainingDiverged(
                f"loss {loss:g} or gradient norm {grad_norm:g} is not finite at step {step}, for "
                f"{self.skipped_in_row} steps in a row (learning rate {learning_rate:g}, images "
                f"{', '.join(images)}); lower train.learning_rate or use train.precision=bf16; {last_good}"
            )
        return False


def check_parameters(adapter: Adapter, step: int, last_good: str) -> None:
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
            f"{len(bad)} modules hold values that are not finite at step {step} ({', '.join(bad[:3])} …); "
            f"lower train.learning_rate; {last_good}"
        )


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
