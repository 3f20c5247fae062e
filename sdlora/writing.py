"""Writes files so that they are complete or not there, and lines so that they are whole."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any


def write_file(
    path: Path, write: Callable[[Path], object], verify: Callable[[Path], object] | None = None
) -> Path:
    """Writes a file so that it is either complete or not there.

    Args:
        path: Where the file shall be.
        write: Writes the content to the temporary path that it is given (same folder).
        verify: Re-opens the temporary file and raises if it is not right.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb+") as handle:
            os.fsync(handle.fileno())
        if verify is not None:
            verify(temporary)
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    return path


def write_text(path: Path, text: str) -> Path:
    """Writes UTF-8 text atomically."""
    return write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8", newline="\n"))


def write_json(path: Path, value: Any) -> Path:
    """Writes JSON atomically, readable by people."""
    return write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def to_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """One JSON object a line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


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
