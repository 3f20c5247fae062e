"""What the stages of a run really take: peak memory of the process and of its GPU, and seconds."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event, Thread

import psutil
import torch

from sdlora.models.base import release_memory

POLL_SECONDS = 0.01
CPU = torch.device("cpu")


@dataclass
class Usage:
    """Peak resident memory of a stage, peak of its tensors on a GPU (0 without one), and its seconds."""

    resident: int = 0
    device: int = 0
    seconds: float = 0.0


class StageMonitor:
    """Watches one stage at a time, a hundred times a second; a stage inside another interrupts it."""

    def __init__(self, device: torch.device = CPU) -> None:
        self.stages: dict[str, Usage] = defaultdict(Usage)
        self._device, self._process = device, psutil.Process()
        self._now: str | None = None
        self._made = self._since = time.monotonic()

    @property
    def total_seconds(self) -> float:
        """Seconds since the watch was made."""
        return time.monotonic() - self._made

    def of(self, stage: str) -> int:
        """Peak of a stage: on the GPU if there is one, else resident."""
        usage = self.stages[stage]
        return usage.device if self._device.type == "cuda" else usage.resident

    def seconds(self, name: str) -> float:
        """Seconds of a stage so far."""
        running = time.monotonic() - self._since if name == self._now else 0.0
        return running + (self.stages[name].seconds if name in self.stages else 0.0)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Watches a stage until the block ends."""
        outer = self._now
        self._switch(name)
        ended = Event()
        if outer is None:
            Thread(target=self._look, args=(ended,), daemon=True).start()
        try:
            yield
        finally:
            ended.set()
            self._switch(outer)

    def _look(self, ended: Event) -> None:
        while not ended.wait(POLL_SECONDS):
            self._note()

    def _note(self) -> None:
        if (now := self._now) is not None:
            usage = self.stages[now]
            usage.resident = max(usage.resident, self._process.memory_info().rss)

    def _switch(self, name: str | None) -> None:
        """Closes the stage so far, gives free memory back to the system, and begins another."""
        now, is_cuda = time.monotonic(), self._device.type == "cuda"
        self._note()
        if self._now is not None:
            usage = self.stages[self._now]
            usage.seconds += now - self._since
            if is_cuda:
                usage.device = max(usage.device, torch.cuda.max_memory_allocated(self._device))
        if is_cuda:
            torch.cuda.reset_peak_memory_stats(self._device)
        release_memory()
        self._now, self._since = name, now
