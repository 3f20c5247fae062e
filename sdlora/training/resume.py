"""What a checkpoint keeps of a run, and how a run goes on from it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from torch import Tensor

from sdlora.errors import RunError
from sdlora.runs import RunFolder
from sdlora.training.checkpoint import read_checkpoint, restore_optimizer, save_checkpoint
from sdlora.training.console import Report
from sdlora.training.guards import Counters
from sdlora.training.learner import Learner, named_tensors
from sdlora.training.plan import RunPlan


def save_state(run: RunFolder, plan: RunPlan, learner: Learner, counters: Counters) -> None:
    """Writes the state of a step, then deletes the oldest ones.

    Raises:
        OSError: If there is no room; nothing is left behind, and no older state is deleted.
    """
    scaler = learner.accelerator.scaler
    save_checkpoint(
        run.checkpoint(counters.step),
        tensors=named_tensors(learner.adapter),
        optimizer=learner.optimizer.state_dict(),
        state={
            "counters": asdict(counters),
            "scaler": scaler.state_dict() if scaler else None,
            "dataset_digest": plan.index.digest,
            "base_digest": plan.info.digest,
        },
    )
    run.remove_checkpoints(keep=plan.config.train.keep_checkpoints)


def load_newest_state(run: RunFolder, plan: RunPlan, learner: Learner, report: Report) -> Counters:
    """Puts a run back to its newest complete state; at step 0 if there is none.

    Raises:
        RunError: If pictures, captions, base or targets are not those of the run.
    """
    for step in reversed(run.checkpoint_steps()):
        try:
            tensors, optimizer, state = read_checkpoint(run.checkpoint(step))
        except RunError as error:
            report.warn(f"{error}; trying the one before")
            continue
        _check_same(run, plan, state)
        _restore(run, learner, tensors, optimizer, state)
        report.say(f"resumed from step {step}")
        return Counters(**state["counters"])
    report.say(f"{run.path} has no complete checkpoint: starting at step 0")
    return Counters()


def _check_same(run: RunFolder, plan: RunPlan, state: dict[str, Any]) -> None:
    for key, value, what in (
        ("dataset_digest", plan.index.digest, "the pictures or captions"),
        ("base_digest", plan.info.digest, "the base"),
    ):
        if state[key] != value:
            raise RunError(
                f"{what} changed since {run.path} was started; start a new run with "
                f"lora.init_from={run.adapter}"
            )


def _restore(
    run: RunFolder,
    learner: Learner,
    tensors: dict[str, Tensor],
    optimizer: dict[str, Any],
    state: dict[str, Any],
) -> None:
    own = named_tensors(learner.adapter)
    if set(own) != set(tensors):
        raise RunError(
            f"the checkpoint in {run.path} adapts other modules than lora.targets; start a new run"
        )
    for name, tensor in own.items():
        tensor.data.copy_(tensors[name])
    restore_optimizer(learner.optimizer, optimizer)
    if learner.accelerator.scaler and state["scaler"]:
        learner.accelerator.scaler.load_state_dict(state["scaler"])
