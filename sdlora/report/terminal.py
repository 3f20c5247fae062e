"""Lines and progress bars on the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class Terminal:
    """Lines and progress bars; nothing if `quiet`."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(quiet=quiet, highlight=False, soft_wrap=True)

    def print(self, *lines: str) -> None:
        """Prints lines as they are, in one piece: a notebook gives each print a cell of its own."""
        if lines:
            self.console.print(Text("\n".join(lines)))

    def warn(self, *lines: str) -> None:
        for line in lines:
            self.console.print(Text(f"warning: {line}", style="yellow"))

    @contextmanager
    def progress(self, title: str, total: int, done: int = 0) -> Iterator[Meter]:
        counts = ("{task.description}", BarColumn(), MofNCompleteColumn(), "{task.fields[note]}")
        times = (TimeElapsedColumn(), "ETA", TimeRemainingColumn())
        progress = Progress(*counts, *times, console=self.console, speed_estimate_period=60)
        try:
            yield Meter(progress, progress.add_task(title, total=total, completed=done, note=""))
        finally:
            if progress.live.is_started:
                progress.stop()


class Meter:
    """One progress bar; it appears with the first finished item, so that an error leaves no empty bar."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def advance(self, count: int = 1, note: str = "") -> None:
        self._progress.start()
        self._progress.update(self._task, advance=count, note=note)

    def show(self, done: int, total: int) -> None:
        self._progress.start()
        self._progress.update(self._task, completed=done, total=total)
