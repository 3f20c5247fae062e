"""Small real runs: the built-in base at 64 px on a few drawings."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sdlora.config import RunConfig, load_config
from sdlora.runs import RunFolder
from sdlora.training.console import Report
from sdlora.training.device import describe_environment, make_accelerator
from sdlora.training.learner import named_tensors
from sdlora.training.loop import StepResult, Trainer
from sdlora.training.plan import make_plan
from sdlora.training.prepare import prepare

SMALL = {
    "data.resolution": 64,
    "lora.rank": 2,
    "train.batch_size": 2,
    "train.learning_rate": 1e-3,
    "train.warmup": 2,
    "train.steps": 4,
    "train.save_every": 0,
    "train.sample_every": 0,
    "train.evaluate_every": 0,
    "sample.steps": 2,
    "sample.seeds": [0],
    "sample.prompts": ["a circle"],
}


class WatchedTrainer(Trainer):
    """Keeps every step's result, and can send itself a signal in the middle of a run."""

    stop_at: int | None = None

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self.results: list[StepResult] = []

    def record(self, result: StepResult, seconds: float) -> None:
        super().record(result, seconds)
        self.results.append(result)
        if result.step == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="session")
def small() -> Callable[..., RunConfig]:
    """A configuration of a small run; keys may be changed."""

    def make(images: Path, **changes: Any) -> RunConfig:
        keys = {name.replace("__", "."): value for name, value in changes.items()}
        return load_config(None, {**SMALL, **keys}, images=images)

    return make


@pytest.fixture
def make_trainer() -> Callable[..., WatchedTrainer]:
    """Builds a trainer as `train` does, without running it."""

    def make(config: RunConfig, folder: Path) -> WatchedTrainer:
        accelerator, precision = make_accelerator(config, str(folder))
        plan = make_plan(config)
        run = RunFolder(folder)
        if not run.config_file.exists():
            RunFolder.create(folder, plan.config, describe_environment(accelerator, precision))
            run.append("plan", 0, **plan.as_event())
        report = Report(quiet=True)
        prepared = prepare(plan, accelerator, precision, report)
        return WatchedTrainer(run, plan, prepared, accelerator, precision, report)

    return make


def tensors_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """A copy of the trained values."""
    return {name: tensor.detach().clone() for name, tensor in named_tensors(trainer.learner.adapter).items()}


@pytest.fixture
def snapshot() -> Callable[[Trainer], dict[str, torch.Tensor]]:
    """Copies the trained values of a trainer."""
    return tensors_of
