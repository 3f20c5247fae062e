"""What ended a run that had begun, in one line with the way on."""

from __future__ import annotations

from dataclasses import replace

import torch

from sdlora.data.records import count_of
from sdlora.errors import DataError, ProcessLost, RunError, SdloraError
from sdlora.runs import RunFolder
from sdlora.training.loop import Trainer
from sdlora.training.memory import as_size
from sdlora.training.out_of_memory import describe_remedies
from sdlora.training.plan import RunPlan


def explain_failure(error: SdloraError | OSError | torch.OutOfMemoryError, trainer: Trainer) -> SdloraError:
    """What ended a run that had begun, with the way on where it can be put right."""
    if isinstance(error, torch.OutOfMemoryError):
        plan = trainer.plan
        advice = describe_remedies(replace(plan.work, config=plan.config), plan.machine)
        pictures = count_of(plan.config.train.micro_batch, "picture")
        failure = RunError(
            f"out of memory in step {trainer.step + 1}, with {pictures} of up to {plan.work.size} at once; "
            f"{advice}; {trainer.way_on()}"
        )
        failure.exit_code = 1
        return failure
    if isinstance(error, ProcessLost):
        return ProcessLost(f"{error}; {trainer.way_on()}", error.exit_code, is_told=error.is_told)
    if isinstance(error, DataError):
        return DataError(f"{error}; {trainer.way_on()}")
    if isinstance(error, OSError) or isinstance(error.__cause__, OSError):
        failure = RunError(f"{error}; then {trainer.way_on()}")
        failure.exit_code = 1
        return failure
    return error


def explain_no_start(plan: RunPlan, run: RunFolder) -> RunError:
    """Out of memory before the first step."""
    needed = f"{as_size(plan.memory.stages['encoding'])} of {plan.machine.device.type} memory"
    failure = RunError(
        f"out of memory while the base was loaded and the pictures encoded, which takes about {needed}; "
        f"free some and `sdlora resume {run.path}`, or start a new run with base.quantize=int8 or a smaller "
        "data.resolution"
    )
    failure.exit_code = 1
    return failure
