"""Small real runs: the built-in base at 64 px, on a few drawings."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from tqdm import tqdm

from sdlora.config import RunConfig, load_config
from sdlora.formats.files import load_adapter
from sdlora.report.terminal import Terminal
from sdlora.runs import RunFolder
from sdlora.training import prepare as preparation
from sdlora.training.checkpoint import read_checkpoint
from sdlora.training.device import describe_environment, make_accelerator
from sdlora.training.logger import StepResult
from sdlora.training.loop import Trainer
from sdlora.training.planning import make_plan
from sdlora.training.prepare import prepare
from tests.checks import HANG_SECONDS

SMALL = {
    "data.resolution": 64,
    "lora.rank": 2,
    "train.batch_size": 2,
    "train.learning_rate": 1e-3,
    "train.schedule": "constant",
    "train.warmup": 2,
    "train.steps": 4,
    "train.save_every": 0,
    "train.sample_every": 0,
    "train.evaluate_every": 0,
    "sample.steps": 2,
    "sample.seeds": [0],
    "sample.strengths": [1.0],
    "sample.prompts": ["a circle"],
}


# The quickest whole run: a few modules, a few pixels, one file at the end.
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
        terminal = Terminal(quiet=True)
        prepared = prepare(plan, accelerator, precision, terminal)
        return WatchedTrainer(run, plan, prepared, accelerator, precision, terminal)

    return make


def tensors_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """A copy of the trained values."""
    return {name: tensor.detach().clone() for name, tensor in trainer.runner.adapter.named_tensors().items()}


@pytest.fixture
def snapshot() -> Callable[[Trainer], dict[str, torch.Tensor]]:
    """Copies the trained values of a trainer."""
    return tensors_of


@dataclass
class Fork:
    """A fork of this process that runs a function, and its output."""

    pid: int
    output: int
    """The end of a pipe, to which a limit on file sizes does not apply."""
    printed: str = ""
    """Its output so far."""
    code: int | None = None

    def poll(self) -> int | None:
        """Its exit code, or minus the signal that ended it; None while it runs."""
        with suppress(BlockingIOError):
            while chunk := os.read(self.output, 2**16):
                self.printed += chunk.decode("utf-8", errors="replace")
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
            return self.poll() if pid else None
        return self.code

    def wait(self) -> int:
        """The exit code; a fork that hangs is an error."""
        end = time.monotonic() + HANG_SECONDS
        while self.poll() is None:
            assert time.monotonic() < end, f"it did not end:\n{self.printed}"
            time.sleep(0.01)
        assert self.code is not None
        return self.code

    def kill(self) -> None:
        """Ends it at once."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()
        os.close(self.output)


@pytest.fixture
def fork() -> Iterator[Callable[..., Fork]]:
    """Forks this process, which has imported everything already; `fork(function, **environment)`."""
    children: list[Fork] = []

    def start(function: Callable[[], Any], **environment: str) -> Fork:
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            _run_in_fork(function, environment, writer)
        os.close(writer)
        children.append(Fork(pid, reader))
        return children[-1]

    yield start
    for child in children:
        child.kill()


def _run_in_fork(function: Callable[[], Any], environment: dict[str, str], output: int) -> None:
    code = 1
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
        os.environ.update(environment)
        # Background jobs of a shell ignore SIGINT, and so do their children.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        AcceleratorState._reset_state(reset_partial_state=True)
        # tqdm's lock is the parent's too: a fork that is killed while it holds it would stop all others.
        tqdm.set_lock(threading.RLock())
        faulthandler.dump_traceback_later(HANG_SECONDS * 0.9, file=sys.stderr)
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


def runs_are_the_same(one: RunFolder, other: RunFolder) -> None:
    """Checks that two runs are equal to the bit: draws, losses, checkpoints, adapters and images."""
    assert list(one.trace()) == list(other.trace())
    for name, keys in {
        "step": ("step", "loss", "loss_ema", "learning_rate", "grad_norm", "images_seen", "skipped"),
        "heldout": ("step", "split", "loss"),
        "samples": ("step", "path"),
    }.items():
        assert events_of(one, name, keys) == events_of(other, name, keys)
    last = max(one.checkpoint_steps())
    (tensors, optimizer, state), (tensors_2, optimizer_2, state_2) = (
        read_checkpoint(run.checkpoint(last)) for run in (one, other)
    )
    assert tensors.keys() == tensors_2.keys()
    assert all(torch.equal(tensors_2[name], tensor) for name, tensor in tensors.items())
    for number, moments in optimizer["state"].items():
        for name, value in moments.items():
            assert torch.equal(optimizer_2["state"][number][name], value)
    assert state == state_2
    saved, saved_2 = (load_adapter(run.step_adapter(last)).modules for run in (one, other))
    assert all(torch.equal(saved_2[name].up, pair.up) for name, pair in saved.items())
    for picture in one.samples.rglob("0*.png"):
        same = other.samples / picture.relative_to(one.samples)
        assert np.array_equal(np.asarray(Image.open(picture)), np.asarray(Image.open(same)))


def events_of(run: RunFolder, name: str, keys: tuple[str, ...]) -> list[tuple[Any, ...]]:
    """Some values of the events of a name."""
    return [tuple(event[key] for key in keys) for event in run.events(name)]


@pytest.fixture
def check_same() -> Callable[[RunFolder, RunFolder], None]:
    """Compares two runs to the bit."""
    return runs_are_the_same


@pytest.fixture
def command_line() -> Callable[..., list[str]]:
    """The arguments of `sdlora train` for a configuration."""

    def make(images: Path, run: RunFolder, config: RunConfig) -> list[str]:
        file = run.path.with_suffix(".toml")
        values = config.model_dump(exclude_defaults=True, exclude={"images"})
        lines = [
            line
            for section, keys in values.items()
            for line in (f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in keys.items()))
        ]
        file.write_text("\n".join(lines), encoding="utf-8")
        return ["sdlora", "train", str(images), "--out", str(run.path), "--config", str(file)]

    return make


@pytest.fixture
def warm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads the base once in this process; every fork has its own copy."""
    monkeypatch.setattr(preparation, "load_base", kept(preparation.load_base))


def kept(load: Callable[..., Any]) -> Callable[..., Any]:
    """Loads once and ignores later arguments."""
    loaded: list[Any] = []

    def once(*args: Any, **kwargs: Any) -> Any:
        if not loaded:
            loaded.append(load(*args, **kwargs))
        return loaded[0]

    return once


@pytest.fixture
def quick(tiny: Callable[..., RunConfig], sd15_folder: Path) -> Callable[..., RunConfig]:
    """A configuration of a tiny run on the tiny base; keys may be changed."""

    def make(images: Path, **changes: Any) -> RunConfig:
        return tiny(images, **{"base__source": str(sd15_folder), **changes})

    return make
