"""Checks that tests share: of errors by their keys, and of work by its amount, not by the clock."""

from __future__ import annotations

import sys
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from sdlora.errors import SdloraError


@contextmanager
def raises(
    kind: type[SdloraError], *keys: str, shows: tuple[str, ...] | str = ()
) -> Iterator[pytest.ExceptionInfo[SdloraError]]:
    """Expects an error of a kind with these keys.

    Args:
        kind: The class.
        keys: Of the error: a setting such as `lora.rank`, or the mistake's own, such as `data.no-images`.
        shows: Values that the message has to name: a file, a number, a setting to change. No sentences.
    """
    with pytest.raises(kind) as caught:
        yield caught
    missing = set(keys) - set(caught.value.keys)
    assert not missing, f"{missing} not in {caught.value.keys}: {caught.value}"
    for value in (shows,) if isinstance(shows, str) else shows:
        assert value in str(caught.value), f"{value!r} is not shown by: {caught.value}"


HANG_SECONDS = 300
"""How long a test waits for another process: a guard against waiting forever, never a measure of speed."""


@dataclass
class Calls:
    """The number of functions, in Python and C, called inside `with counted() as calls`."""

    count: int = 0


@contextmanager
def counted() -> Iterator[Calls]:
    """Measures work by calls, which do not depend on the machine's speed."""
    calls = Calls()

    def note(frame: object, event: str, value: object) -> None:
        calls.count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        yield calls
    finally:
        sys.setprofile(None)


@contextmanager
def bounded(calls: int = 1_000_000, megabytes: int | None = None) -> Iterator[None]:
    """Fails if what happens inside takes much work or memory, on a fast machine as on a slow one.

    Args:
        calls: Of functions, in Python and C.
        megabytes: At the peak; None does not measure it, which takes a while.
    """
    if megabytes is not None:
        tracemalloc.start()
    started = time.process_time()
    try:
        with counted() as done:
            yield
    finally:
        spent, (_, peak) = time.process_time() - started, tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert done.count < calls, f"{done.count:,} calls"
    assert megabytes is None or peak < megabytes * 2**20, f"{peak:,} bytes"
    # A single call can hang as well: of an expression that backtracks, or a number of many digits.
    assert spent < HANG_SECONDS


def assert_same_image(one: Any, other: Any) -> None:
    """Compares images, (..., H, W, 3), that two code paths, libraries or files made.

    Kernels round by batch, memory layout and machine, so that few values differ, by 1 of 255. The same
    computation twice on one machine is compared with `np.array_equal` instead.
    """
    difference = np.abs(np.asarray(one, dtype=np.int32) - np.asarray(other, dtype=np.int32))
    assert difference.max() <= 2
    assert (difference > 0).mean() < 0.01
