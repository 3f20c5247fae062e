"""What the page may show: the runs below a folder, and the image folders that are named or used."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdlora.config import MAX_JSON_BYTES
from sdlora.errors import RunError, one_line
from sdlora.reading import UnfitFileError, read_json
from sdlora.runs import RunFolder

TAIL_BYTES = 2**12
MAX_STEP = 10**9


@dataclass(frozen=True, slots=True)
class Overview:
    """A run in a list.

    Attributes:
        state: `running`, `finished`, `failed` or `stopped`.
        step: Steps done.
        steps: Steps planned.
        loss: Running mean of the training loss.
        changed: Time of the last event, or of the start.
        problem: What went wrong, in one line.
    """

    name: str
    path: Path
    state: str
    step: int
    steps: int
    loss: float | None
    changed: float
    images: str
    grid: Path | None
    problem: str = ""


class Library:
    """Runs and image folders by the names that addresses use; nothing else can be reached."""

    def __init__(self, folder: Path, images: Sequence[Path] = ()) -> None:
        self.folder = Path(os.path.realpath(folder))
        self.named = [Path(os.path.realpath(path)) for path in images]
        self._folders: dict[str, RunFolder] = {}
        self._known: dict[Path, tuple[tuple[int, ...], Overview]] = {}

    def list_runs(self) -> list[Overview]:
        """All runs, the newest first; unchanged ones are not read again."""
        found = [self.overview(run) for run in self._runs(self.folder)]
        return sorted(found, key=lambda run: (run.state != "running", -run.changed, run.name))

    def run(self, name: str) -> RunFolder:
        """The run of a name in the list; raises a RunError for all else."""
        path = Path(os.path.realpath(self.folder / name.replace("\0", "")))
        run = RunFolder(path)
        if not (path.is_relative_to(self.folder) and self.name_of(path) == name and is_run(run)):
            raise RunError(f"there is no run {one_line(name)!r:.80} in {self.folder}", key="run.missing")
        return run

    def overview(self, run: RunFolder) -> Overview:
        """The state of a run now."""
        files = (run.config_file, run.events_file, run.process_file, run.output_file)
        stamp, known = tuple(map(_stamp, files)), self._known.get(run.path)
        if known is None or known[0] != stamp or known[1].state == "running":
            known = self._known[run.path] = (stamp, self._read(run))
        return known[1]

    def name_of(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def image_folders(self) -> dict[str, Path]:
        """Image folders that exist, by their names in addresses."""
        used = (Path(os.path.realpath(run.images)) for run in self.list_runs() if run.images)
        folders = [*self.named, *used]
        return {name_folder(path): path for path in dict.fromkeys(folders) if path.is_dir()}

    def _runs(self, folder: Path, depth: int = 2) -> Iterator[RunFolder]:
        """Runs in a folder, and in its folders that are none; no links, which may lead out of it."""
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            return
        for entry in entries:
            if entry.name.startswith(".") or not entry.is_dir(follow_symlinks=False):
                continue
            # To make the paths of a thousand runs takes longer than to look for their changes.
            run = self._folders.get(entry.path) or RunFolder(entry.path)
            if is_run(run):
                self._folders[entry.path] = run
                yield run
            elif depth > 1:
                yield from self._runs(run.path, depth - 1)

    def _read(self, run: RunFolder) -> Overview:
        config, tail = read_object(run.config_file), read_tail(run.events_file)
        train = config.get("train")
        steps = train.get("steps") if isinstance(train, dict) else 0
        steps = steps if isinstance(steps, int) else 0
        last = {event["event"]: event for event in tail}
        state, problem = _judge(run, tail, steps)
        losses, times = ([y for e in tail for y in numbers(e.get(key))] for key in ("loss_ema", "time"))
        begun = next(filter(None, (_stamp(file) for file in (run.output_file, run.config_file))), 0) / 1e9
        return Overview(
            name=self.name_of(run.path),
            path=run.path,
            state=state,
            step=max((last[name]["step"] for name in ("step", "saved", "done") if name in last), default=0),
            steps=steps,
            loss=losses[-1] if losses else None,
            changed=times[-1] if times else begun,
            images=images if isinstance(images := config.get("images"), str) and "\0" not in images else "",
            grid=next(iter(list_grids(run).values()), None),
            problem=problem,
        )


def is_run(run: RunFolder) -> bool:
    """Whether a folder is a run, or one that the page has started."""
    return run.exists or run.output_file.is_file()


def name_folder(path: Path) -> str:
    """A short name of a folder for addresses."""
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:12]


def list_grids(run: RunFolder) -> dict[int, Path]:
    """The grids of a run by step, the last first."""
    with suppress(OSError):
        names = [entry.name.removeprefix("step-") for entry in os.scandir(run.samples)]
        steps = sorted((int(name) for name in names if name.isdecimal()), reverse=True)
        grids = {step: run.sample_folder(step) / "grid.png" for step in steps}
        return {step: grid for step, grid in grids.items() if grid.is_file()}
    return {}


def read_tail(file: Path) -> list[dict[str, Any]]:
    """The last events of a run, without its first ones."""
    try:
        with file.open("rb") as handle:
            size = handle.seek(0, os.SEEK_END)
            handle.seek(max(0, size - TAIL_BYTES))
            lines = handle.read().split(b"\n")
    except OSError:
        return []
    return parse_events(lines[1:] if size > TAIL_BYTES else lines)


def parse_events(lines: Sequence[bytes]) -> list[dict[str, Any]]:
    """Events among lines; those that are none are left out, as after a crash."""
    events = []
    for line in lines:
        with suppress(ValueError, RecursionError):
            event = json.loads(line)
            is_event = isinstance(event, dict) and isinstance(event.get("event"), str)
            if is_event and isinstance(event.get("step"), int) and 0 <= event["step"] < MAX_STEP:
                events.append(event)
    return events


def numbers(value: Any) -> list[float]:
    """A finite number as a list, else an empty one."""
    return [value] if isinstance(value, float) and math.isfinite(value) else []


def _judge(run: RunFolder, tail: Sequence[dict[str, Any]], steps: int) -> tuple[str, str]:
    """State of a run, and its problem."""
    if run.process:
        return "running", ""
    refusal = _find_refusal(run)
    if any(event["event"] == "done" and event["step"] >= steps for event in tail):
        return "finished", refusal
    if tail and tail[-1]["event"] == "failed":
        return "failed", one_line(str(tail[-1].get("message")))
    if not run.exists:
        last = _last_words(run).removeprefix("sdlora: ")
        if last.startswith("stopped"):
            return "stopped", "it was stopped before its first step"
        return "failed", last or "it ended before its first step"
    return "stopped", refusal or _describe_kill(run)


def _describe_kill(run: RunFolder) -> str:
    """That a process of this machine ended without removing its mark; empty if it did not."""
    is_ours = read_object(run.process_file).get("host") == platform.node()
    if not is_ours or "sdlora: stopped" in read_end(run.output_file):
        return ""
    saved = run.checkpoint_steps()
    rest = f"Resume continues from step {saved[-1]}" if saved else "it has saved no checkpoint"
    return f"its process was killed, by hand or for want of memory, or the machine was restarted; {rest}"


def _find_refusal(run: RunFolder) -> str:
    """Why a process that the page has started ended at once, after all that the run tells itself."""
    if _stamp(run.output_file) <= max(_stamp(run.events_file), _stamp(run.log_file)):
        return ""
    line = _last_words(run)
    is_refusal = line.startswith("sdlora: ") and not line.startswith("sdlora: stopped")
    return line.removeprefix("sdlora: ") if is_refusal else ""


def _last_words(run: RunFolder) -> str:
    """The last line that the process of a run has printed; empty without any."""
    return one_line("".join(read_end(run.output_file).splitlines()[-1:]))


def read_end(file: Path, max_bytes: int = TAIL_BYTES) -> str:
    """The last lines of a log."""
    try:
        with file.open("rb") as handle:
            handle.seek(max(0, handle.seek(0, os.SEEK_END) - max_bytes))
            return handle.read(max_bytes).decode("utf-8", "replace")
    except OSError:
        return ""


def _stamp(file: Path) -> int:
    """Time of the last change in ns; 0 without the file."""
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return 0


def read_object(file: Path) -> dict[str, Any]:
    with suppress(OSError, UnfitFileError):
        if isinstance(value := read_json(file, MAX_JSON_BYTES), dict):
            return value
    return {}
