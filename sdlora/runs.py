"""The run folder: its paths and its events."""

from __future__ import annotations

import os
import platform
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from sdlora.config import MAX_JSON_BYTES, RunConfig, read_config
from sdlora.errors import ConfigError, RunError, join_names
from sdlora.notebook import show_html
from sdlora.reading import UnfitFileError, read_json
from sdlora.writing import (
    append_lines,
    read_lines,
    remove_leftovers,
    temporary_name,
    to_lines,
    write_json,
    write_text,
)

DTYPES = ("fp32", "bf16", "fp16")
# A clock that is set moves the time at which a process seems to have been started.
CLOCK_SECONDS = 60.0
# A process of another machine that has written nothing for so long is taken for dead.
MOST_SILENT_SECONDS = 3600


class RunFolder:
    """Everything that a run has written; the only code that knows the paths inside.

    Args:
        path: The folder; it may not exist yet.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.json"
        self.environment_file = self.path / "environment.json"
        self.events_file = self.path / "events.jsonl"
        self.log_file = self.path / "train.log"  # what was printed
        self.trace_file = self.path / "trace.jsonl"  # with train.trace
        self.process_file = self.path / "process.json"  # while a process writes the run
        self.output_file = self.path / "output.log"  # of a process that the page started
        self.ratings_file = self.path / "ratings.jsonl"
        self.adapters = self.path / "adapters"  # to use
        self.checkpoints = self.path / "checkpoints"  # to continue from
        self.samples = self.path / "samples"
        self.loss_curve = self.path / "loss.png"
        self.report = self.path / "report.html"
        self.webui = self.path / "webui"
        self.evaluation_file = self.path / "evaluation.json"
        self.evaluation_curve = self.path / "evaluation.png"
        self.evaluation_images = self.path / "evaluation"
        self.best_adapter = self.adapters / "best.safetensors"
        self.advice_file = self.path / "rank.json"
        self.rank_curve = self.path / "rank.png"
        self.model_card = self.adapters / "README.md"

    def ask(self, request: str) -> None:
        """Asks the process that trains the run to "save" or to "sample" after the step that it is at."""
        (self.path / f"{request}.request").touch()

    def take_requests(self) -> set[str]:
        """What was asked for since the last call."""
        taken = set()
        for request in ("save", "sample"):
            with suppress(OSError):
                (self.path / f"{request}.request").unlink()
                taken.add(request)
        return taken

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    def _repr_html_(self) -> str:
        """Its state, the curve of its losses and its last grid."""
        steps, done = self.losses, any(self.events("done"))
        lines = [f"{'finished' if done else 'not finished'} at step {steps[-1][0]}"] if steps else []
        for event in list(self.events("heldout"))[-2:]:
            split, loss = str(event.get("split")), event.get("loss")
            lines.append(f"loss, {split}: {loss:.4f} at step {event['step']}" if loss else split)
        grids = sorted(self.samples.glob("step-*/grid.png"))[-1:]
        return show_html(f"run {self.path}", lines, [self.loss_curve, *grids])

    @classmethod
    def create(cls, path: str | Path, config: RunConfig, environment: Mapping[str, Any]) -> RunFolder:
        """Creates a run folder; raises a RunError if it contains a run, or cannot be written."""
        run = cls(path)
        run.check_free()
        try:
            for file in (run.environment_file, run.config_file):
                remove_leftovers(run.path, name=file.name)
            write_json(run.environment_file, dict(environment))
            run.write_config(config)
        except OSError as error:
            problem = f"cannot write run folder {path}: {error.strerror}; use another --out"
            raise RunError(problem, key="run.not-writable") from None
        return run

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RunFolder:
        """Opens an existing run; raises a RunError if it is none."""
        run = cls(path)
        if run.exists and not (run.path / "model_index.json").is_file():
            return run
        near = [cls(folder) for folder in [*run.path.parents[:3], *sorted(run.path.glob("*/"))[:100]]]
        found = [str(one.path) for one in near if one.exists]
        listed = join_names(found, 3, " or ")
        remedy = f"use {listed}" if found else "use the folder that `sdlora train` printed"
        if run.path.is_file():
            remedy = "unpack it, and use the folder" if run.path.suffix == ".zip" else remedy
            raise RunError(f"{path} is a file, not a run folder; {remedy}", key="run.file")
        if not run.path.is_dir():
            raise RunError(f"run folder {path} does not exist; {remedy}", key="run.missing")
        if (run.path / "model_index.json").is_file():
            raise RunError(f"{path} is a base, not a run or a LoRA; pass it with --base", key="run.base")
        raise RunError(f"{path} is not a run folder (no config.json); {remedy}", key="run.no-config")

    def check_free(self) -> None:
        """Checks that no run would be overwritten."""
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"--out {self.path} is a file; use a folder", key="run.file")
        if self.exists:
            remedy = f"use another folder, or continue that run with `sdlora resume {self.path}`"
            raise RunError(f"--out {self.path} already contains a run; {remedy}", key="run.exists")

    @property
    def exists(self) -> bool:
        """Whether the folder is a run."""
        return self.config_file.is_file()

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.path.absolute().name

    @property
    def adapter(self) -> Path:
        """The final adapter, if possible in diffusers' dialect; else the newest one; else a RunError.

        While a finished run is continued, its final adapter is that of an earlier step.
        """
        steps = self.saved_steps()
        # Without events, such as in an archive of the files alone, nothing is being continued.
        if not steps or any(self.events("done")) or not any(self.events("step")):
            for dialect in ("diffusers", "kohya"):
                if (final := self.final_adapter(dialect)).is_file():
                    return final
        if steps:
            return self.step_adapter(steps[-1])
        remedy = f"continue it with `sdlora resume {self.path}`"
        raise RunError(f"run {self.path} has no saved adapter yet; {remedy}", key="run.no-adapter")

    def final_adapter(self, dialect: str = "diffusers") -> Path:
        """The file of the last step, which is there once the run has ended."""
        return self.adapters / f"final{'' if dialect == 'diffusers' else f'.{dialect}'}.safetensors"

    def ranked_adapter(self, rank: int, dialect: str = "diffusers") -> Path:
        return self.adapters / f"rank-{rank}{self.final_adapter(dialect).name.removeprefix('final')}"

    def step_adapter(self, step: int) -> Path:
        """The file of a saved step; `saved_steps` says which there are."""
        return self.adapters / f"step-{step:06d}.safetensors"

    def saved_adapter(self, step: int | str) -> Path:
        """An existing adapter of a step, or the one for "final" or "best", which `evaluate` recommended."""
        if step == "best":
            if self.best_adapter.is_file():
                return self.best_adapter
            problem = f"--step best: run {self.path} has no adapters/best.safetensors"
            raise RunError(f"{problem}; `sdlora evaluate {self.path} --export` writes it", key="run.no-step")
        is_final, number = step == "final", str(step)
        file = self.adapter if is_final else self.step_adapter(int(number) if number.isdecimal() else 0)
        if not file.is_file() or (is_final and file.stem.startswith("step-")):
            steps = ", ".join(map(str, self.saved_steps())) or "none"
            problem = f"--step {step}: run {self.path} has no adapter of that step; saved steps: {steps}"
            raise RunError(problem, key="run.no-step")
        return file

    def checkpoint(self, step: int) -> Path:
        """The folder from which a run is resumed at a step."""
        return self.checkpoints / f"step-{step:06d}"

    def checkpoint_adapter(self, step: int) -> Path:
        """The adapter's fp32 tensors in the checkpoint of a step; `average.` precedes those of an EMA."""
        return self.checkpoint(step) / "adapter.safetensors"

    def step_of(self, adapter: Path) -> int | None:
        """The step of a saved adapter; that of the last `done` event for the final one."""
        if adapter.stem.startswith("final"):
            return max((event["step"] for event in self.events("done")), default=None)
        return next(iter(_steps([adapter.stem])), None)

    def sample_folder(self, step: int) -> Path:
        return self.samples / f"step-{step:06d}"

    def saved_steps(self) -> list[int]:
        """Steps with a saved adapter, in order."""
        return _steps(file.stem for file in self.adapters.glob("step-*.safetensors"))

    def checkpoint_steps(self) -> list[int]:
        """Steps with a complete checkpoint, in order."""
        return _steps(folder.name for folder in self.checkpoints.glob("step-*") if folder.is_dir())

    def remove_checkpoints(self, keep: int, last: int | None = None) -> None:
        """Deletes all but the newest checkpoints.

        Args:
            keep: Number of checkpoints to keep.
            last: Also deletes those of later steps: a run that continues from here could not read them.
        """
        steps = self.checkpoint_steps()
        good = [step for step in steps if last is None or step <= last]
        for step in set(steps) - set(good[-keep:]):
            folder = self.checkpoint(step)
            # Renamed first: a partly deleted checkpoint must not look like one.
            leaving = temporary_name(folder)
            with suppress(OSError):
                folder.rename(leaving)
            shutil.rmtree(leaving, ignore_errors=True)

    def remove_saved(self, last: int) -> None:
        """Deletes the adapters and grids of steps after `last`: a run that continues otherwise has others."""
        for step in self.saved_steps():
            if step > last:
                self.step_adapter(step).unlink(missing_ok=True)
        for step in _steps(folder.name for folder in self.samples.glob("step-*")):
            if step > last:
                shutil.rmtree(self.sample_folder(step), ignore_errors=True)

    def remove_leftovers(self) -> None:
        """Deletes temporary files and folders of interrupted writes."""
        remove_leftovers(self.path, self.adapters, self.checkpoints, *self.samples.glob("step-*"))

    def read_config(self) -> RunConfig:
        """The resolved configuration; raises a RunError if it cannot be read."""
        try:
            return read_config(self.config_file)
        except (OSError, UnfitFileError) as error:
            raise RunError(f"cannot read {self.config_file}: {error}", key="run.config") from None
        except ConfigError as error:
            problem = f"{self.config_file} has invalid settings: {'; '.join(error.problems)}"
            raise RunError(problem, key="run.config") from None

    def write_config(self, config: RunConfig) -> None:
        """Writes the resolved configuration; from then on, the folder is a run."""
        write_json(self.config_file, config.model_dump(mode="json"))

    def read_environment(self) -> dict[str, Any]:
        """Versions, device and dtypes; raises a RunError if they cannot be read."""
        try:
            value = read_json(self.environment_file, MAX_JSON_BYTES)
        except (OSError, UnfitFileError) as error:
            raise RunError(f"cannot read {self.environment_file}: {error}", key="run.environment") from None
        if not isinstance(value, dict):
            problem = f"{self.environment_file} is not a JSON object; restore it, or start a new run"
            raise RunError(problem, key="run.environment")
        return value

    def read_evaluation(self) -> dict[str, Any]:
        """What `sdlora evaluate` wrote; empty if there is nothing, or it cannot be read."""
        with suppress(OSError, UnfitFileError):
            values = read_json(self.evaluation_file, MAX_JSON_BYTES)
            return values if isinstance(values, dict) else {}
        return {}

    def add_evaluation(self, **values: Any) -> None:
        """Adds to `evaluation.json`; what else it has stays."""
        write_json(self.evaluation_file, {**self.read_evaluation(), **values})

    @property
    def base_dtype(self) -> str:
        """Dtype of the run's base: `fp32`, `bf16` or `fp16`; raises a RunError if it is not recorded."""
        name = self.read_environment().get("base_dtype")
        if name not in DTYPES:
            problem = f"{self.environment_file} has base_dtype {name!r:.40}, not one of {', '.join(DTYPES)}"
            raise RunError(f"{problem}; restore it, or start a new run", key="run.environment")
        return str(name)

    def append(self, event: str, step: int, **values: Any) -> dict[str, Any]:
        """Appends an event, and returns it."""
        record = {"event": event, "step": step, "time": round(time.time(), 3), **values}
        append_lines(self.events_file, [record])
        return record

    @contextmanager
    def occupied(self, is_main: bool = True) -> Iterator[None]:
        """Names the process that writes the run in `process.json` meanwhile, for those who look at it."""
        if is_main:
            self.name_process(os.getpid())
        try:
            yield
        finally:
            if is_main:
                with suppress(OSError):
                    self.process_file.unlink(missing_ok=True)

    def name_process(self, pid: int) -> None:
        """Writes `process.json`; a full disk does not stop a run."""
        with suppress(OSError, psutil.Error):
            started = psutil.Process(pid).create_time()
            write_json(self.process_file, {"pid": pid, "host": platform.node(), "started": started})

    def append_trace(self, rows: Sequence[Mapping[str, Any]]) -> None:
        append_lines(self.trace_file, rows)

    def events(self, *names: str) -> Iterator[dict[str, Any]]:
        """Events in order, optionally only those with given names; skips invalid lines (after a crash)."""
        for record in read_lines(self.events_file):
            if isinstance(name := record.get("event"), str) and (not names or name in names):
                yield record

    @property
    def losses(self) -> list[tuple[int, float]]:
        """Step and loss of each training step, in order; `events("heldout")` has the validation losses."""
        return [(event["step"], event["loss"]) for event in self.events("step")]

    @property
    def process(self) -> psutil.Process | None:
        """The process that writes the run, if it runs on this machine."""
        named = self._read_process()
        if not isinstance(pid := named.get("pid"), int) or named.get("host") != platform.node():
            return None
        with suppress(psutil.Error, TypeError, ValueError, OverflowError):
            process = psutil.Process(pid)
            # Another process may have got the number since. The clock of a network disk is not asked.
            is_same = abs(process.create_time() - float(named.get("started", 0))) < CLOCK_SECONDS
            if is_same and process.status() != psutil.STATUS_ZOMBIE:
                return process
        return None

    @property
    def is_written(self) -> bool:
        """Whether a process writes the run: of this machine, or of another and not silent for long."""
        host = self._read_process().get("host")
        if host is None or host == platform.node():
            return self.process is not None
        newest = 0.0
        for file in (self.process_file, self.events_file, self.log_file):
            with suppress(OSError):
                newest = max(newest, file.stat().st_mtime)
        return time.time() - newest < MOST_SILENT_SECONDS

    def check_unwritten(self) -> None:
        """Raises a RunError if another process writes the run: two would undo each other's work."""
        process = self.process
        if process is None:
            return
        own = psutil.Process()
        # A launcher may be named for the processes that it starts.
        if process.pid not in (own.pid, *(parent.pid for parent in own.parents())):
            problem = f"run {self.path} is being trained by process {process.pid}"
            raise RunError(f"{problem}; wait for it, or stop it first: kill {process.pid}", key="run.written")

    def _read_process(self) -> dict[str, Any]:
        try:
            named = read_json(self.process_file, MAX_JSON_BYTES)
        except (OSError, UnfitFileError):
            return {}
        return named if isinstance(named, dict) else {}

    def follow(self, *names: str, seconds: float = 1.0) -> Iterator[dict[str, Any]]:
        """Events from the first on, and new ones as they are written, until no process writes the run.

        Args:
            names: Only these events.
            seconds: Time between two looks at the file.
        """
        seen = 0
        while True:
            is_over = not self.is_written  # asked first, so that the last event is not missed
            found = list(self.events())
            yield from (event for event in found[seen:] if not names or event["event"] in names)
            seen = len(found)
            if is_over:
                return
            time.sleep(seconds)

    def cut_events(self, step: int) -> None:
        """Removes events and trace after a step; a resumed run writes them again."""
        # These events of the step itself come after its checkpoint, so they are written again too.
        again = {"done", "exported", "failed", "gap", "postflight", "usage"} | (
            {"heldout"} if step == 0 else set()
        )
        kept = [event for event in self.events() if event["step"] <= step and event["event"] not in again]
        write_text(self.events_file, to_lines(kept))
        if self.trace_file.is_file():
            write_text(self.trace_file, to_lines(row for row in self.trace() if row["step"] <= step))

    def trace(self) -> Iterator[dict[str, Any]]:
        """The draws of each sample of each step, in order; skips invalid lines (after a crash)."""
        yield from read_lines(self.trace_file)

    def is_finished(self, steps: int) -> bool:
        """Whether the run has been completed with this number of steps."""
        return any(event["step"] >= steps for event in self.events("done"))


def _steps(names: Iterable[str]) -> list[int]:
    """Steps in names such as `step-000200`, in order."""
    return sorted(int(match[1]) for name in names if (match := re.fullmatch(r"step-([0-9]{1,9})", name)))
