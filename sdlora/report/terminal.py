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
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class Terminal:
    """Lines and progress bars on the terminal.

    Args:
        quiet: Prints nothing; for the other processes, and for callers that want none.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(quiet=quiet, highlight=False, soft_wrap=True)

    def print(self, *lines: str) -> None:
        """Prints lines as they are, in one piece: a notebook gives each print a cell of its own."""
        if lines:
            self.console.print(Text("\n".join(lines)))

    def warn(self, *lines: str) -> None:
        """Prints lines that want attention."""
        for line in lines:
            self.console.print(Text(f"warning: {line}", style="yellow"))

    @contextmanager
    def progress(self, title: str, total: int, done: int = 0) -> Iterator[Meter]:
        """A bar with an ETA for as long as the context lasts."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
        )
        progress = Progress(*columns, console=self.console, speed_estimate_period=60)
        try:
            yield Meter(progress, progress.add_task(title, total=total, completed=done, note=""))
        finally:
            if progress.live.is_started:
                progress.stop()


class Meter:
    """One progress bar; it appears with the first finished item, so that an error leaves no empty bar."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task

    def advance(self, count: int = 1, note: str = "") -> None:
        """Counts what is done, and notes how it goes."""
        self._progress.start()
        self._progress.update(self._task, advance=count, note=note)

    def show(self, done: int, total: int) -> None:
        """Sets what is done, and of how much."""
        self._progress.start()
        self._progress.update(self._task, completed=done, total=total)
