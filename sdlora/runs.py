"""The run folder: its paths, its events, and reading it back."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from sdlora.config import MAX_JSON_BYTES, RunConfig, read_config
from sdlora.errors import ConfigError, RunError
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


class RunFolder:
    """What a run has written; the only place that knows the paths inside.

    Args:
        path: The folder; it need not exist.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    @classmethod
    def create(cls, path: str | Path, config: RunConfig, environment: Mapping[str, Any]) -> RunFolder:
        """Makes a new run folder.

        Raises:
            RunError: If a run is already there, or the place is not writable.
        """
        run = cls(path)
        run.check_free()
        try:
            for file in (run.environment_file, run.config_file):
                remove_leftovers(run.path, name=file.name)
            write_json(run.environment_file, dict(environment))
            run.write_config(config)
        except OSError as error:
            raise RunError(
                f"the run folder {path} cannot be written: {error.strerror}; give another --out"
            ) from None
        return run

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RunFolder:
        """Opens an existing run.

        Raises:
            RunError: If the folder is missing or holds no run.
        """
        run = cls(path)
        if run.path.is_file():
            raise RunError(f"{path} is a file, not a run; give the folder that `sdlora train` printed")
        if not run.path.is_dir():
            raise RunError(f"run folder {path} does not exist; give the folder that `sdlora train` printed")
        if (run.path / "model_index.json").is_file():
            raise RunError(f"{path} is a base, not a run or a LoRA; give it with --base")
        if not run.exists:
            raise RunError(
                f"{path} holds no run (no config.json); give the folder that `sdlora train` printed"
            )
        return run

    def check_free(self) -> None:
        """Refuses a folder that already holds a run.

        Raises:
            RunError: If it does, or if it is a file.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"--out {self.path} is a file; give a folder")
        if self.exists:
            raise RunError(
                f"--out {self.path} already holds a run; give another folder, or `sdlora resume {self.path}`"
            )

    @property
    def exists(self) -> bool:
        """Whether the folder holds a run."""
        return self.config_file.is_file()

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.path.absolute().name

    @property
    def config_file(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.json"

    @property
    def environment_file(self) -> Path:
        """Versions, device and dtypes."""
        return self.path / "environment.json"

    @property
    def events_file(self) -> Path:
        """One JSON object a line."""
        return self.path / "events.jsonl"

    @property
    def trace_file(self) -> Path:
        """With `train.trace`: one JSON object a line for each sample of each step."""
        return self.path / "trace.jsonl"

    @property
    def adapters(self) -> Path:
        """Saved adapters, to use."""
        return self.path / "adapters"

    @property
    def checkpoints(self) -> Path:
        """Saved states, to continue."""
        return self.path / "checkpoints"

    @property
    def samples(self) -> Path:
        """Grids and single images."""
        return self.path / "samples"

    @property
    def loss_curve(self) -> Path:
        """The image of the losses."""
        return self.path / "loss.png"

    @property
    def evaluation_file(self) -> Path:
        """What `sdlora evaluate` measured."""
        return self.path / "evaluation.json"

    @property
    def advice_file(self) -> Path:
        """What `sdlora advise-rank` measured."""
        return self.path / "rank.json"

    @property
    def rank_curve(self) -> Path:
        """The image of what each rank keeps."""
        return self.path / "rank.png"

    @property
    def model_card(self) -> Path:
        """The card beside the final adapter, as Hugging Face reads it."""
        return self.adapters / "README.md"

    @property
    def adapter(self) -> Path:
        """The final adapter in diffusers' format, else the newest saved one.

        Raises:
            RunError: If none has been saved yet.
        """
        final = self.final_adapter()
        if final.is_file():
            return final
        kohya = self.final_adapter("kohya")
        if kohya.is_file():
            return kohya
        steps = self.saved_steps()
        if not steps:
            raise RunError(f"run {self.path} has saved no adapter yet; `sdlora resume {self.path}` goes on")
        return self.step_adapter(steps[-1])

    def final_adapter(self, dialect: str = "diffusers") -> Path:
        """Where the final file of a dialect is, or will be."""
        return self.adapters / (
            "final.safetensors" if dialect == "diffusers" else f"final.{dialect}.safetensors"
        )

    def ranked_adapter(self, rank: int, dialect: str = "diffusers") -> Path:
        """Where the final adapter at a smaller rank is, or will be."""
        return self.adapters / f"rank-{rank}{self.final_adapter(dialect).name.removeprefix('final')}"

    def step_adapter(self, step: int) -> Path:
        """Where the adapter saved at a step is, or will be."""
        return self.adapters / f"step-{step:06d}.safetensors"

    def saved_adapter(self, step: int) -> Path:
        """The adapter saved at a step.

        Raises:
            RunError: If none was saved then; names the steps that have one.
        """
        file = self.step_adapter(step)
        if not file.is_file():
            steps = ", ".join(map(str, self.saved_steps())) or "none"
            raise RunError(f"--step {step}: run {self.path} saved no adapter at that step; saved are {steps}")
        return file

    def checkpoint(self, step: int) -> Path:
        """Where the state of a step is, or will be."""
        return self.checkpoints / f"step-{step:06d}"

    def sample_folder(self, step: int) -> Path:
        """Where the samples of a step are, or will be."""
        return self.samples / f"step-{step:06d}"

    def saved_steps(self) -> list[int]:
        """Steps whose adapter is saved, in order."""
        return _steps(file.stem for file in self.adapters.glob("step-*.safetensors"))

    def checkpoint_steps(self) -> list[int]:
        """Steps whose state is complete, in order."""
        return _steps(folder.name for folder in self.checkpoints.glob("step-*") if folder.is_dir())

    def remove_checkpoints(self, keep: int, last: int | None = None) -> None:
        """Deletes all but the newest states.

        Args:
            keep: How many stay.
            last: States of later steps go too: a run that goes on from here could not read them.
        """
        steps = self.checkpoint_steps()
        good = [step for step in steps if last is None or step <= last]
        for step in set(steps) - set(good[-keep:]):
            folder = self.checkpoint(step)
            # A state that is half deleted must not have the name of one.
            leaving = temporary_name(folder)
            with suppress(OSError):
                folder.rename(leaving)
            shutil.rmtree(leaving, ignore_errors=True)

    def remove_leftovers(self) -> None:
        """Deletes the temporary files and folders of writes that were cut short."""
        remove_leftovers(self.path, self.adapters, self.checkpoints, *self.samples.glob("step-*"))

    def read_config(self) -> RunConfig:
        """The resolved configuration of the run.

        Raises:
            RunError: If it cannot be read, or is not one that this version wrote.
        """
        try:
            return read_config(self.config_file)
        except (OSError, UnfitFileError) as error:
            raise RunError(f"{self.config_file} cannot be read: {error}") from None
        except ConfigError as error:
            raise RunError(
                f"{self.config_file} does not hold the settings of a run: {'; '.join(error.problems)}"
            ) from None

    def write_config(self, config: RunConfig) -> None:
        """Writes the resolved configuration; a run exists from here on."""
        write_json(self.config_file, config.model_dump(mode="json"))

    def read_environment(self) -> dict[str, Any]:
        """Versions, device and dtypes of the run.

        Raises:
            RunError: If it cannot be read.
        """
        try:
            value = read_json(self.environment_file, MAX_JSON_BYTES)
        except (OSError, UnfitFileError) as error:
            raise RunError(f"{self.environment_file} cannot be read: {error}") from None
        if not isinstance(value, dict):
            raise RunError(f"{self.environment_file} is no JSON object; restore it, or start a new run")
        return value

    @property
    def base_dtype(self) -> str:
        """In which dtype the run has its base: `fp32`, `bf16` or `fp16`.

        Raises:
            RunError: If the run does not say.
        """
        name = self.read_environment().get("base_dtype")
        if name not in DTYPES:
            raise RunError(
                f"{self.environment_file} has base_dtype {name!r:.40}, not one of {', '.join(DTYPES)}; "
                "restore it, or start a new run"
            )
        return str(name)

    def append(self, event: str, step: int, **values: Any) -> dict[str, Any]:
        """Adds an event and gives it back."""
        record = {"event": event, "step": step, "time": round(time.time(), 3), **values}
        append_lines(self.events_file, [record])
        return record

    def append_trace(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Adds lines to the trace, each with its `step`."""
        append_lines(self.trace_file, rows)

    def events(self, *names: str) -> Iterator[dict[str, Any]]:
        """The events in order, or only those of the given names; a line that is none is skipped.

        A crash may have cut the last one short.
        """
        for record in read_lines(self.events_file):
            if isinstance(name := record.get("event"), str) and (not names or name in names):
                yield record

    def cut_events(self, step: int) -> None:
        """Drops the events, and the trace, after a step, since they will happen again."""
        # What follows the checkpoint of a step, or at step 0 the start, happens again as well.
        again = {"done", "exported", "failed", "gap", "postflight", *(["heldout"] if step == 0 else [])}
        kept = [event for event in self.events() if event["step"] <= step and event["event"] not in again]
        write_text(self.events_file, to_lines(kept))
        if self.trace_file.is_file():
            write_text(self.trace_file, to_lines(row for row in self.trace() if row["step"] <= step))

    def trace(self) -> Iterator[dict[str, Any]]:
        """What was drawn for each sample of each step, in order; a line that a crash cut short is skipped."""
        yield from read_lines(self.trace_file)

    def is_finished(self, steps: int) -> bool:
        """Whether the run has ended at this number of steps."""
        return any(event["step"] >= steps for event in self.events("done"))


def _steps(names: Iterable[str]) -> list[int]:
    """The steps of names such as `step-000200`, in order."""
    return sorted(int(match[1]) for name in names if (match := re.fullmatch(r"step-([0-9]{1,9})", name)))
