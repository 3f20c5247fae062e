"""Ctrl-C, SIGTERM and SIGUSR1: finish the step, save, leave; a second signal stops at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

# Batch schedulers send SIGUSR1 ahead of the end of a job's time; Windows has none.
SIGNALS = (signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []))
# A launcher passes on what its processes may have got already, such as from the same Ctrl-C or scheduler.
ECHO_SECONDS = 2.0


class StopSignals:
    """A context in which the first signal is only noted, in `received`."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._time = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        # Python allows handlers in the main thread only.
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    @property
    def exit_signal(self) -> int:
        """What the exit code says: SIGINT, or SIGTERM for all that a scheduler sends."""
        return signal.SIGINT if self.received == signal.SIGINT else signal.SIGTERM

    def _note(self, number: int, frame: FrameType | None) -> None:
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
