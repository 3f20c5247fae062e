"""Lines and progress bars on the terminal, and the same lines in a log file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TaskID,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from tqdm.auto import tqdm

from sdlora.writing import fold

BEAT_SECONDS = 30.0


class Terminal:
    """Lines and progress bars; nothing if `quiet`.

    Without a terminal, as in the log of a scheduler, a line every half minute takes the place of a bar.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(quiet=quiet, highlight=False, soft_wrap=True)
        self._file: Path | None = None
        self._early: list[str] = []  # printed before there was a log file

    def print(self, *lines: str) -> None:
        """Prints lines as they are, in one piece: a notebook gives each print a cell of its own."""
        if lines:
            self.console.print(Text(self._fold("\n".join(lines))))
            self._log(*lines)

    def warn(self, *lines: str) -> None:
        for line in lines:
            self.console.print(Text(self._fold(f"warning: {line}"), style="yellow"))
            self._log(f"warning: {line}")

    def _fold(self, text: str) -> str:
        return fold(text, self.console.width) if self.console.is_terminal else text

    def beat(self, line: str) -> None:
        """A sign of life: printed where no bar is seen, and in the log file."""
        if not (self.console.is_terminal or self.console.is_jupyter):
            self.console.print(Text(line))
        self._log(line)

    @contextmanager
    def keep(self, file: Path | None) -> Iterator[None]:
        """Appends all lines to a log file, with those so far, and what ended the block early."""
        self._file = file
        self._log(*self._early)
        try:
            yield
        except BaseException as error:
            self._log(f"{type(error).__name__}: {error}")
            raise
        finally:
            self._file, self._early = None, []

    def _log(self, *lines: str) -> None:
        """Writes lines to the log file; a full disk does not stop a run."""
        if self._file is None:
            self._early += lines
        elif lines:
            with suppress(OSError), self._file.open("a", encoding="utf-8", errors="replace") as log:
                log.write("".join(f"{line}\n" for line in lines))

    @contextmanager
    def progress(self, title: str, total: int, done: int = 0) -> Iterator[Meter]:
        counts = ("{task.description}", BarColumn(), MofNCompleteColumn(), "{task.fields[note]}")
        times = (TimeElapsedColumn(), "ETA", _Rest())
        # Rich's bar needs ipywidgets in a notebook; tqdm's does not.
        in_notebook = self.console.is_jupyter and not self.console.quiet
        progress = Progress(
            *counts, *times, console=self.console, speed_estimate_period=60, disable=in_notebook
        )
        task = progress.add_task(title, total=total, completed=done, note="", rest=None)
        bar = tqdm(desc=title, total=total, initial=done, delay=1e-9) if in_notebook else None
        try:
            yield Meter(progress, task, self.beat, bar)
        finally:
            if bar is not None:
                bar.close()
            if progress.live.is_started:
                progress.stop()


class _Rest(TimeRemainingColumn):
    """The time left as the run knows it, else what the rate of this bar gives."""

    max_refresh = 0

    def render(self, task: Task) -> Text:
        rest = task.fields["rest"]
        if rest is None or task.finished:
            return super().render(task)
        return Text(str(timedelta(seconds=round(rest))), style="progress.remaining")


class Meter:
    """One progress bar; it appears with the first finished item, so that an error leaves no empty bar."""

    def __init__(
        self,
        progress: Progress,
        task: TaskID,
        print_beat: Callable[[str], None],
        bar: tqdm[Any] | None = None,
    ) -> None:
        self._progress, self._task, self._print_beat, self._bar = progress, task, print_beat, bar
        self._first = self._told = progress.tasks[0].completed
        self._started = self._last_beat = time.monotonic()

    def advance(self, count: int = 1, note: str = "", rest: float | None = None) -> None:
        """Adds finished items; `rest` are the seconds left, if they are known better than by their rate."""
        self._progress.start()
        self._progress.update(self._task, advance=count, note=note, rest=rest)
        self._beat_if_due()

    def show(self, done: int, total: int) -> None:
        """Sets what is finished; another total is another piece of work, with a rate of its own."""
        self._progress.start()
        if total != self._progress.tasks[0].total:
            self._progress.reset(self._task, total=total, completed=done)
            self._first, self._started = done, time.monotonic()
        self._progress.update(self._task, completed=done, total=total)
        self._beat_if_due()

    def beat(self) -> None:
        """Prints a line with what is done, its rate, and the time that the rest takes at this rate."""
        self._last_beat, task = time.monotonic(), self._progress.tasks[0]
        if task.completed == self._told:
            return
        self._told, seconds = task.completed, max(self._last_beat - self._started, 1e-9)
        rate = (task.completed - self._first) / seconds
        known = task.fields["rest"]
        if known is None and rate:
            known = ((task.total or 0) - task.completed) / rate
        done = f"{task.description} {task.completed:.0f}/{task.total or 0:.0f}"
        # What was there already has no rate.
        parts = [task.fields["note"], f"{rate:.3g} a second" if rate else ""]
        parts += [f"ETA {timedelta(seconds=round(known))}"] if known is not None else []
        self._print_beat(": ".join(filter(None, (done, ", ".join(filter(None, parts))))))

    def _beat_if_due(self) -> None:
        if self._bar is not None:
            task = self._progress.tasks[0]
            self._bar.set_postfix_str(task.fields["note"], refresh=False)
            self._bar.total = task.total
            self._bar.update(task.completed - self._bar.n)
        if time.monotonic() - self._last_beat >= BEAT_SECONDS:
            self.beat()
