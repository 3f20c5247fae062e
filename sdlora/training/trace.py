"""What was drawn for every sample of a step, on whichever process: the data's half of an exact resume."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import Accelerator

from sdlora.data.batches import Sample
from sdlora.training.learner import Draw
from sdlora.training.processes import sum_over


def gather_draws(
    accelerator: Accelerator, samples: Sequence[Sample], own: Sequence[Draw]
) -> tuple[Draw, ...]:
    """The draws of all samples of a step, in their order.

    Args:
        samples: Those of the step.
        own: This process's draws.
    """
    numbers = torch.zeros((len(samples), 2), dtype=torch.int64)
    places = {sample.index: place for place, sample in enumerate(samples)}
    for draw in own:
        numbers[places[draw.index]] = torch.tensor([draw.noise_seed, draw.timestep])
    rows = sum_over(accelerator, numbers).tolist()
    return tuple(
        Draw(sample.index, sample.record.name, sample.caption, seed, timestep)
        for sample, (seed, timestep) in zip(samples, rows, strict=True)
    )
