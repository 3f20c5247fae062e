"""Atomic writes: a file is complete or absent, a line is complete or absent."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from sdlora.errors import RunError


def write_file(
    path: Path, write: Callable[[Path], object], verify: Callable[[Path], object] | None = None
) -> Path:
    """Writes a temporary file in the same folder, then renames it.

    Args:
        path: Path of the file.
        write: Writes the content to the given temporary path.
        verify: Reads the temporary file and raises an error if it is wrong.

    Raises:
        OSError: If it cannot be written; with the name of the file, not the temporary one.
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
    """Checks that a file or folder can be made; raises a RunError if its parent is not a writable folder."""
    parent = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        problem = f"cannot write --out {path} ({parent} is not writable); use another path"
        raise RunError(problem, key="option--out")


def cache_folder() -> Path:
    """`SDLORA_CACHE`, else the platform's cache folder for users."""
    given = os.environ.get("SDLORA_CACHE")
    if given:
        return Path(given).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "sdlora"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "sdlora" / "Cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sdlora"


def next_free_folder(path: Path) -> Path:
    """The path, or with `-2`, `-3`, … appended if it exists."""
    candidate, number = path, 2
    while candidate.exists():
        candidate, number = path.with_name(f"{path.name}-{number}"), number + 1
    return candidate


def temporary_name(path: Path) -> Path:
    """Name of a file or folder while this process writes it."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def remove_leftovers(*folders: Path, name: str = "*") -> None:
    """Deletes temporary files and folders of interrupted writes, whose final names match a pattern."""
    for rest in (rest for folder in folders for rest in folder.glob(f".{name}.*.tmp")):
        if not rest.name.split(".")[-2].isdigit():
            continue
        if rest.is_dir():
            shutil.rmtree(rest, ignore_errors=True)
        else:
            rest.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> Path:
    """Writes UTF-8 text atomically; lone surrogates are escaped as in JSON."""
    raw = text.encode("utf-8", "backslashreplace")
    return write_file(path, lambda temporary: temporary.write_bytes(raw))


def write_json(path: Path, value: Any) -> Path:
    return write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder survive a power cut, if the system supports it."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def to_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(_strict(row), ensure_ascii=False) + "\n" for row in rows)


def _strict(value: Any) -> Any:
    """Replaces NaN and infinities, which JSON does not have, by strings."""
    if isinstance(value, Mapping):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def append_lines(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Appends complete lines or, if the disk is full, none: a partial line would spoil the next one."""
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
    """The JSON objects in a file that have a `step`; skips other lines."""
    if not file.is_file():
        return
    # Not splitlines: JSON strings may contain other line separators.
    with file.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                yield row


def fold(text: str, width: int) -> str:
    """Lines of at most `width` characters, broken between words; longer words, such as paths, stay whole.

    What is broken off stands below the text that follows a label, such as `memory    needs 2 GB`.
    """
    return "\n".join(folded for line in text.splitlines() for folded in _fold_line(line, width))


def _fold_line(line: str, width: int) -> list[str]:
    if len(line) <= width:
        return [line]
    label = re.match(r"\s*\S+\s{2,}|\s+", line)
    indent = min(len(label[0]), width // 2) if label else 4
    return textwrap.wrap(
        line, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )
