"""Writes files so that they are complete or not there, and lines so that they are whole."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from sdlora.errors import RunError


def write_file(
    path: Path, write: Callable[[Path], object], verify: Callable[[Path], object] | None = None
) -> Path:
    """Writes a file so that it is either complete or not there.

    Args:
        path: Where the file shall be.
        write: Writes the content to the temporary path that it is given (same folder).
        verify: Re-opens the temporary file and raises if it is not right.

    Raises:
        OSError: If it cannot be written; names the file, not the temporary one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        write(temporary)
        with temporary.open("rb+") as handle:
            os.fsync(handle.fileno())
        if verify is not None:
            verify(temporary)
        temporary.replace(path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is not None:
            error.filename = str(path)
        raise
    return path


def check_writable(path: Path) -> None:
    """Checks that a file or folder can be made, without making it.

    Raises:
        RunError: If its nearest existing parent is not a writable folder.
    """
    parent = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise RunError(
            f"--out {path} cannot be written ({parent} is not writable); choose another path",
            key="option--out",
        )


def next_free_folder(path: Path) -> Path:
    """The path, or with `-2` and so on behind when that is taken."""
    candidate, number = path, 2
    while candidate.exists():
        candidate, number = path.with_name(f"{path.name}-{number}"), number + 1
    return candidate


def temporary_name(path: Path) -> Path:
    """What a file or folder is called while this process writes it."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def remove_leftovers(*folders: Path, name: str = "*") -> None:
    """Deletes what writes that were cut short left in some folders.

    Args:
        folders: Those below them are left alone.
        name: A pattern of the names that were to be.
    """
    for folder in folders:
        for rest in folder.glob(f".{name}.*.tmp"):
            if not rest.name.split(".")[-2].isdigit():
                continue
            if rest.is_dir():
                shutil.rmtree(rest, ignore_errors=True)
            else:
                rest.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> Path:
    """Writes UTF-8 text atomically; half of a letter becomes the escape that JSON has for it."""
    raw = text.encode("utf-8", "backslashreplace")
    return write_file(path, lambda temporary: temporary.write_bytes(raw))


def write_json(path: Path, value: Any) -> Path:
    """Writes JSON atomically, readable by people."""
    return write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sync_folder(folder: Path) -> None:
    """Makes what was renamed or made in a folder last through a power cut, where the system can."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def to_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """One JSON object a line."""
    return "".join(json.dumps(_strict(row), ensure_ascii=False) + "\n" for row in rows)


def _strict(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become text."""
    if isinstance(value, Mapping):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def append_lines(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Adds whole lines or, where the disk is full, none: a rest would spoil the next line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rest = memoryview(to_lines(rows).encode("utf-8", "backslashreplace"))
    with file.open("ab", buffering=0) as handle:
        before = handle.tell()
        try:
            while rest:
                rest = rest[handle.write(rest) :]
        except OSError:
            with suppress(OSError):
                handle.truncate(before)
            raise


def read_lines(file: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file that have a step; other lines are skipped."""
    if not file.is_file():
        return
    # Not splitlines: JSON text may hold line separators of other kinds.
    with file.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                yield row
