"""What a checkpoint keeps of a run, and how a run goes on from it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict
from typing import Any

from torch import Tensor

from sdlora.errors import RunError
from sdlora.runs import RunFolder
from sdlora.training.checkpoint import read_checkpoint, read_state, restore_optimizer, save_checkpoint
from sdlora.training.console import Report
from sdlora.training.device import Precision, package_versions
from sdlora.training.guards import Counters
from sdlora.training.identity import Change, check_identity, identify
from sdlora.training.learner import Learner, named_tensors
from sdlora.training.plan import RunPlan

AVERAGE = "average."


def save_state(run: RunFolder, plan: RunPlan, learner: Learner, counters: Counters) -> None:
    """Writes the state of a step, then deletes the oldest ones.

    Raises:
        OSError: If there is no room; nothing is left behind, and no older state is deleted.
    """
    scaler, average = learner.accelerator.scaler, learner.average
    averages = average.values if average else {}
    save_checkpoint(
        run.checkpoint(counters.step),
        tensors={
            **named_tensors(learner.adapter),
            **{AVERAGE + name: value for name, value in averages.items()},
        },
        optimizer=learner.optimizer.state_dict(),
        state={
            "counters": asdict(counters),
            "num_averaged": average.num_updates if average else 0,
            "scaler": scaler.state_dict() if scaler else None,
            "identity": identify(plan, learner.precision),
            "versions": dict(package_versions()),
        },
    )
    run.remove_checkpoints(keep=plan.config.train.keep_checkpoints)


def newest_complete_step(run: RunFolder, report: Report) -> int:
    """The step of the newest state that can be read whole; 0 if there is none."""
    for step in reversed(run.checkpoint_steps()):
        try:
            read_checkpoint(run.checkpoint(step))
        except RunError as error:
            report.warn(f"{error}; trying the one before")
            continue
        return step
    return 0


def check_state(
    run: RunFolder, step: int, plan: RunPlan, precision: Precision, allowed: Collection[str]
) -> list[Change]:
    """Compares what a state belongs to with what it would go on with.

    Returns:
        What changed and was allowed to.

    Raises:
        RunError: With a line for each change that was not.
    """
    state = read_state(run.checkpoint(step))
    return check_identity(run, step, state["identity"], identify(plan, precision), allowed)


def load_state(run: RunFolder, step: int, learner: Learner) -> Counters:
    """Puts a learner back to the state of a step.

    Raises:
        RunError: If it is of another adapter or another optimizer, or of another program.
    """
    folder = run.checkpoint(step)
    tensors, optimizer, state = read_checkpoint(folder)
    try:
        _restore(run, learner, tensors, optimizer, state)
        return Counters.restore(state["counters"])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        raise RunError(
            f"checkpoint {folder} does not fit the run ({type(error).__name__}: {error}); "
            "take it away to go on from the one before"
        ) from None


def _restore(
    run: RunFolder,
    learner: Learner,
    tensors: dict[str, Tensor],
    optimizer: dict[str, Any],
    state: dict[str, Any],
) -> None:
    own = named_tensors(learner.adapter)
    averages = {
        name.removeprefix(AVERAGE): value for name, value in tensors.items() if name.startswith(AVERAGE)
    }
    if set(own) != {name for name in tensors if not name.startswith(AVERAGE)}:
        raise RunError(
            f"the checkpoint in {run.path} adapts other modules than lora.targets; start a new run"
        )
    for name, tensor in own.items():
        if tensors[name].shape != tensor.shape:
            raise ValueError(f"{name} is {tuple(tensors[name].shape)}, not {tuple(tensor.shape)}")
        tensor.data.copy_(tensors[name])
    if learner.average is not None:
        learner.average.restore(averages, state["num_averaged"])
    restore_optimizer(learner.optimizer, optimizer)
    if learner.accelerator.scaler and state["scaler"]:
        learner.accelerator.scaler.load_state_dict(state["scaler"])
