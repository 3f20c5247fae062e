"""Small real runs: the built-in base at 64 px on a few drawings."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from sdlora.config import RunConfig, load_config
from sdlora.runs import RunFolder
from sdlora.training.console import Report
from sdlora.training.device import describe_environment, make_accelerator
from sdlora.training.journal import StepResult
from sdlora.training.learner import named_tensors
from sdlora.training.loop import Trainer
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


# As quick as a whole run gets: a few modules, a few pixels, one file at the end.
TINY = {
    "data__resolution": 32,
    "lora__targets": ["*.attn2.to_v"],
    "export__formats": "diffusers",
    "train__batch_size": 1,
    "sample__batch_size": 1,
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
def tiny(small: Callable[..., RunConfig]) -> Callable[..., RunConfig]:
    """A configuration of a tiny run; keys may be changed."""

    def make(images: Path, **changes: Any) -> RunConfig:
        return small(images, **{**TINY, **changes})

    return make


@pytest.fixture
def make_trainer() -> Callable[..., WatchedTrainer]:
    """Builds a trainer as `train` does, without running it."""

    def make(config: RunConfig, folder: Path) -> WatchedTrainer:
        accelerator, precision = make_accelerator(config)
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


@dataclass
class Fork:
    """A copy of this warm process that runs something of its own, and what it printed."""

    pid: int
    log: Path
    code: int | None = None

    def poll(self) -> int | None:
        """Its exit code, or minus the signal that ended it; None while it runs."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def wait(self, seconds: float = 60) -> int:
        """The exit code; one that takes too long is an error."""
        end = time.monotonic() + seconds
        while self.poll() is None:
            assert time.monotonic() < end, f"it did not end in {seconds} s:\n{self.printed}"
            time.sleep(0.01)
        assert self.code is not None
        return self.code

    def kill(self) -> None:
        """Ends it at once."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()

    @property
    def printed(self) -> str:
        """What it wrote to the terminal."""
        return self.log.read_text(encoding="utf-8", errors="replace")


@pytest.fixture
def fork(tmp_path: Path) -> Iterator[Callable[..., Fork]]:
    """Forks this process, which has imported everything already; `fork(function, **environment)`."""
    children: list[Fork] = []

    def start(function: Callable[[], Any], **environment: str) -> Fork:
        log = tmp_path / f"fork-{len(children)}.log"
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            _run_in_fork(function, environment, log)
        children.append(Fork(pid, log))
        return children[-1]

    yield start
    for child in children:
        child.kill()


def _run_in_fork(function: Callable[[], Any], environment: dict[str, str], log: Path) -> None:
    code = 1
    try:
        with log.open("w", encoding="utf-8") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
        os.environ.update(environment)
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            function()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


@pytest.fixture
def fork_processes(fork: Callable[..., Fork]) -> Callable[..., list[Fork]]:
    """Forks the processes of one run, as a launcher would start them."""

    def start(count: int, function: Callable[[], Any]) -> list[Fork]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1"}
        return [
            fork(
                function,
                **{
                    name: str(value)
                    for name, value in {**shared, "MASTER_PORT": port, "RANK": n, "LOCAL_RANK": n}.items()
                },
            )
            for n in range(count)
        ]

    return start
