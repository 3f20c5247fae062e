"""Several processes as one run: collectives, stop signals, and errors that reach every process.

Collectives raise `ProcessLost` if another process ended or does not answer.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object
from torch import Tensor
from torch import distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import PrefixStore

from sdlora.errors import ConfigError, ProcessLost, RunStopped, SdloraError, first_line

T = TypeVar("T")
# Batch schedulers send SIGUSR1 before the time of a job ends; Windows has none.
SIGNALS = (signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []))
# A launcher forwards signals that its processes may have received already, such as from the same Ctrl-C.
ECHO_SECONDS = 2.0
# Time between two exchanges while each process works on a share of its own.
ROUND_SECONDS = 10.0
# A host that is cut off cannot reach the store of the others.
STORE_SECONDS = 5.0
# Variables that `accelerate launch` exports for engines that wrap the model.
ENGINES = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}


def num_launched(environment: Mapping[str, str]) -> int:
    """The number of processes that the launcher started."""
    return int(environment.get("WORLD_SIZE") or 1)


def check_launcher(environment: Mapping[str, str]) -> None:
    """Raises a ConfigError for engines that launchers offer and this trainer does not use."""
    for variable, engine in ENGINES.items():
        if environment.get(variable, "").lower() in ("1", "true", "yes"):
            problem = f"the launcher requests {engine} ({variable}), which sdlora does not use"
            reason = "only the adapter is trained, and each process has the whole base"
            raise ConfigError(f"{problem}: {reason}; launch without it", key="launcher-engine")


def needs_gloo(environment: Mapping[str, str]) -> bool:
    """Whether several processes were started on a machine without an accelerator."""
    return num_launched(environment) > 1 and not torch.accelerator.is_available()


def group_settings(timeout_seconds: float) -> InitProcessGroupKwargs:
    """The process group's timeout, after which a process gives up waiting for the others."""
    atexit.register(leave)
    return InitProcessGroupKwargs(timeout=timedelta(seconds=timeout_seconds))


def leave() -> None:
    """Closes this process's connections to the others."""
    if dist.is_initialized():
        dist.destroy_process_group()


def all_reduce_sum(accelerator: Accelerator, values: Tensor) -> Tensor:
    """The sum over all processes, on each of them, on the device of `values`."""
    if accelerator.num_processes == 1:
        return values
    with distributed_errors():
        total: Tensor = accelerator.reduce(values.to(accelerator.device), "sum")
        return total.to(values.device)


def all_gather(accelerator: Accelerator, value: T) -> list[T]:
    """A small object of each process, by rank, on all of them."""
    if accelerator.num_processes == 1:
        return [value]
    with distributed_errors():
        return list(gather_object([value]))


def all_reduce_count(accelerator: Accelerator, count: int) -> int:
    """The sum of a number over all processes."""
    return int(all_reduce_sum(accelerator, torch.tensor(int(count))))


def broadcast(accelerator: Accelerator, value: T) -> T:
    """The main process's value, on all processes."""
    if accelerator.num_processes == 1:
        return value
    with distributed_errors():
        values: list[T] = broadcast_object_list([value])
    return values[0]


def barrier(accelerator: Accelerator) -> None:
    """Waits for all processes."""
    if accelerator.num_processes > 1:
        with distributed_errors():
            accelerator.wait_for_everyone()


def work_in_rounds(accelerator: Accelerator, jobs: Iterable[T], work: Callable[[T], object]) -> None:
    """Runs the jobs of this process; no process waits for another longer than a round and a job."""
    queue = deque(jobs)
    while all_reduce_count(accelerator, len(queue)):
        end = time.monotonic() + ROUND_SECONDS
        while queue and (accelerator.num_processes == 1 or time.monotonic() < end):
            work(queue.popleft())


class StopSignals:
    """Records the first signal in `received` instead of ending the process; a second one ends it."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._time = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        # Python allows signal handlers in the main thread only.
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._record) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A launcher ends this process soon after one that was lost: the error must be printed first.
        if not isinstance(error, ProcessLost):
            self._restore()

    @property
    def exit_signal(self) -> int:
        """The signal of the exit code: SIGINT, or SIGTERM for all that a scheduler sends."""
        return signal.SIGINT if self.received == signal.SIGINT else signal.SIGTERM

    def _record(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._time = number, time.monotonic()
            if "LOCAL_RANK" not in os.environ:
                self._restore()
        elif time.monotonic() - self._time > ECHO_SECONDS:
            self._restore()
            os.kill(os.getpid(), number)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


@contextmanager
def propagate_failure(accelerator: Accelerator) -> Iterator[None]:
    """Passes an error that ends this process to the others and closes the connections: none waits for it."""
    try:
        yield
    except (RunStopped, ProcessLost):
        raise
    except BaseException as error:
        if accelerator.num_processes > 1 and dist.is_initialized():
            _write_failure(accelerator.process_index, error)
            leave()
        raise


@contextmanager
def distributed_errors() -> Iterator[None]:
    """Raises the failure of a collective as `ProcessLost`: another process ended."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise _explain(error) from error


def _explain(error: RuntimeError) -> ProcessLost:
    if failure := _within(STORE_SECONDS, _read_failure):
        message = f"process {failure['process']} on {failure['host']} ended: {failure['reason']}"
        return ProcessLost(message, failure["code"], is_explained=True)
    return ProcessLost(f"another process ended or does not answer ({first_line(error)})")


def _write_failure(process: int, error: BaseException) -> None:
    failure = {
        "process": process,
        "host": socket.gethostname(),
        "reason": str(error) if isinstance(error, SdloraError) else f"{type(error).__name__}: {error}",
        "code": error.exit_code if isinstance(error, SdloraError) else 1,
    }
    _within(STORE_SECONDS, lambda: _store().set("failure", json.dumps(failure)))


def _read_failure() -> dict[str, Any] | None:
    store = _store()
    return dict(json.loads(store.get("failure"))) if store.check(["failure"]) else None


def _store() -> PrefixStore:
    """The key-value store of the process group."""
    return PrefixStore("sdlora", distributed_c10d._get_default_store())


def _within(seconds: float, ask: Callable[[], T]) -> T | None:
    """The result, or None if it takes too long or fails."""
    answers: list[T] = []

    def run() -> None:
        try:
            answers.append(ask())
        except (RuntimeError, ValueError):
            return

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None
