"""`train.batch_size = auto`: the largest micro-batch that the memory holds, tried before the run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache
from torch import Tensor

from sdlora.data.batches import Sample
from sdlora.training.learner import Learner
from sdlora.training.out_of_memory import as_out_of_memory
from sdlora.training.plan import RunPlan
from sdlora.training.processes import count_over

# Beside the parameters and gradients that a trial has: the two moments of AdamW.
MOMENTS = 2


def fit_batch(plan: RunPlan, learner: Learner, accelerator: Accelerator) -> RunPlan:
    """Divides what a process has to do in a step into the fewest micro-batches; the global batch is kept.

    The trial is a forward and backward pass over copies of the largest picture. It draws nothing from any
    random state and leaves no gradient.

    Args:
        plan: With `train.batch_size = auto`.
        learner: Goes through the trials.
        accelerator: All its processes take the same size.

    Returns:
        The plan with numbers for `train.batch_size` and `train.accumulate`.

    Raises:
        OutOfMemoryError: If not even one sample fits.
    """
    share = plan.config.train.accumulate
    for size in halve(share):
        fits = _try(learner, largest_samples(plan, size))
        if count_over(accelerator, fits) == accelerator.num_processes:
            train = {"batch_size": size, "accumulate": share // size}
            return replace(plan, config=plan.config.replace(train=train))
    raise torch.OutOfMemoryError("not even one picture fits")


def halve(share: int) -> Iterator[int]:
    """Divisors of a number, from itself down, each at most half of the one before."""
    size = share
    while size:
        if share % size == 0:
            yield size
            size //= 2
        else:
            size -= 1


def largest_samples(plan: RunPlan, count: int) -> list[Sample]:
    """Copies of a picture of the largest bucket."""
    crops = plan.buckets.crops
    record = max(plan.index.records, key=lambda record: crops[record.name][0].size.area)
    return [Sample(index, record, crops[record.name][0], record.caption) for index in range(count)]


def _try(learner: Learner, samples: Sequence[Sample]) -> bool:
    """Whether a micro-batch goes through, with what the optimizer will take lying beside it."""
    fits = False
    with suppress(torch.OutOfMemoryError), as_out_of_memory():
        moments: list[Tensor] = [torch.empty_like(p) for p in learner.parameters for _ in range(MOMENTS)]
        learner.go_through(0, list(samples), len(samples))
        fits = bool(moments)
    moments = []
    learner.optimizer.zero_grad(set_to_none=True)
    clear_device_cache()
    return fits
