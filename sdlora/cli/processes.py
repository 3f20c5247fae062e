"""The command line in one of several processes: the first of a host prints for all."""

from __future__ import annotations

import os
import signal
import time

# The launcher ends all processes once one has ended: the first one has this long to report the error.
GRACE_SECONDS = 10.0
# After a signal the launcher waits by itself.
STOP_SECONDS = 2.0


def is_first() -> bool:
    """Whether this is the only process, or the first of all."""
    return os.environ.get("RANK", "0") == "0"


def heed_schedulers() -> None:
    """Makes SIGUSR1 end the process as SIGTERM does, until a run handles both."""
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, lambda number, frame: os.kill(os.getpid(), signal.SIGTERM))


def speaks_for_host() -> bool:
    """Whether this is the only process of its host, or the first."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def wait_for_first(exit_code: int, seconds: float = GRACE_SECONDS) -> None:
    """Waits, in other processes than the first of this host, until the launcher ends this one.

    Returns if it does not: then the other processes have no error.
    """
    if speaks_for_host():
        return

    def end(number: int, frame: object) -> None:
        raise SystemExit(exit_code)

    signal.signal(signal.SIGTERM, end)
    time.sleep(seconds)
