"""What ended a run, in one line with the way on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

import torch

from sdlora.data.records import count_of
from sdlora.errors import DataError, ProcessLost, RunError, RunStopped, SdloraError
from sdlora.report.curve import draw_loss_curve
from sdlora.runs import RunFolder
from sdlora.training.loop import Trainer
from sdlora.training.memory import as_size
from sdlora.training.out_of_memory import as_out_of_memory, describe_remedies
from sdlora.training.plan import RunPlan


@contextmanager
def telling_no_start(plan: RunPlan, run: RunFolder) -> Iterator[None]:
    """Running out of memory before the first step is a line with the way on."""
    try:
        with as_out_of_memory():
            yield
    except torch.OutOfMemoryError as error:
        raise _explain_no_start(plan, run) from error


@contextmanager
def telling_failure(trainer: Trainer) -> Iterator[None]:
    """What ends a run that has begun is a line with the way on, and an event; its trackers are closed."""
    try:
        with as_out_of_memory():
            yield
    except RunStopped:
        raise
    except (SdloraError, OSError, torch.OutOfMemoryError) as error:
        failure = _explain(error, trainer)
        trainer.event("failed", message=str(failure))
        # A launcher ends this process right after one that was lost: what matters is that it is told.
        if trainer.accelerator.is_main_process and not isinstance(error, ProcessLost):
            with suppress(OSError):
                draw_loss_curve(trainer.run)
        if failure is error:
            raise
        raise failure from error
    finally:
        for tracker in trainer.accelerator.trackers:
            tracker.finish()


def _explain(error: SdloraError | OSError | torch.OutOfMemoryError, trainer: Trainer) -> SdloraError:
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


def _explain_no_start(plan: RunPlan, run: RunFolder) -> RunError:
    needed = f"{as_size(plan.memory.stages['encoding'])} of {plan.machine.device.type} memory"
    failure = RunError(
        f"out of memory while the base was loaded and the pictures encoded, which takes about {needed}; "
        f"free some and `sdlora resume {run.path}`, or start a new run with base.quantize=int8 or a smaller "
        "data.resolution"
    )
    failure.exit_code = 1
    return failure
