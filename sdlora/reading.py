"""Reads files that anybody may have made: bounded in size, never a device, and checked before use."""

from __future__ import annotations

import json
import re
import stat
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
MAX_HEADER_BYTES = 16 * 2**20
MAX_TENSORS = 100_000
MAX_NOTES = 10_000
MAX_NAME = 500
MAX_DEPTH = 8
MAX_VALUES = 5000
# A TOML key of thousands of dots takes the parser minutes.
MAX_DOTS = 500
_END = re.compile(rb'"data_offsets"\s*:\s*\[\s*\d+\s*,\s*(\d{1,18})\s*\]')


class UnfitFileError(ValueError):
    """A file that is not read; the message completes "FILE ..."."""


@dataclass(frozen=True, slots=True)
class Header:
    """The header of a safetensors file."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    """As safetensors has them: `F32`, `BF16` …"""
    metadata: dict[str, str]
    num_bytes: int
    """Size of the file."""
    spans: dict[str, tuple[int, int]]
    """Where each tensor lies in the file: its first byte, and how many."""


def check_file(path: Path) -> int:
    """The size of a regular file, in bytes; a pipe or a device might never end.

    Raises:
        OSError: If it is not there.
        UnfitFileError: If it is something else.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
        raise UnfitFileError(f"is {kind}, not a file")
    return status.st_size


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """Reads a whole file of at most so many bytes.

    Raises:
        OSError: If it cannot be read.
        UnfitFileError: If it is larger, or no file at all.
    """
    size = check_file(path)
    data = b""
    if size <= max_bytes:
        with path.open("rb") as handle:
            # A buffer is made for all that is asked for, whatever the file has.
            data = handle.read(size + 1)
            if len(data) > size:
                data += handle.read(max_bytes + 1 - len(data))
        size = max(size, len(data))
    if size > max_bytes:
        raise UnfitFileError(f"is too large ({_megabytes(size)}; at most {_megabytes(max_bytes)} are read)")
    return data


def read_json(path: Path, max_bytes: int) -> Any:
    """Reads a JSON file in UTF-8.

    Raises:
        OSError: If it cannot be read.
        UnfitFileError: If it is too large, or not JSON.
    """
    return parse_json(read_bytes(path, max_bytes))


def parse_json(text: str | bytes) -> Any:
    """Reads JSON, however deep and strange.

    Raises:
        UnfitFileError: If it is not JSON, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise UnfitFileError("is nested too deeply") from None
    except ValueError as error:  # Also bytes that are no text, and numbers of thousands of digits.
        raise UnfitFileError(f"is not JSON ({error})") from None


def parse_toml(text: str) -> dict[str, Any]:
    """Reads TOML, however deep and strange.

    Raises:
        UnfitFileError: If it is not TOML, or nested too deeply.
    """
    if any(line.count(".") > MAX_DOTS for line in text.split("\n")):
        raise UnfitFileError(f"has a line with more than {MAX_DOTS} dots")
    try:
        values = tomllib.loads(text)
    except RecursionError:
        raise UnfitFileError("is nested too deeply") from None
    except ValueError as error:  # Also numbers of thousands of digits.
        raise UnfitFileError(f"is not TOML: {error}") from None
    level: list[Any] = [values]
    count = 0
    for _ in range(MAX_DEPTH):
        count += sum(map(len, level))
        level = [inner for value in level for inner in _containers(value)]
    if level:
        raise UnfitFileError("is nested too deeply")
    if count > MAX_VALUES:
        raise UnfitFileError(f"holds {count:,} values, which no settings do; at most {MAX_VALUES:,} are read")
    return values


def _containers(value: Any) -> Iterator[Any]:
    """The tables and lists inside a table or list."""
    items = value.values() if isinstance(value, dict) else value
    return (item for item in items if isinstance(item, dict | list))


def read_header(path: Path) -> Header:
    """Reads the header of a safetensors file and checks that the file is whole (R-25).

    The library's own parser comes first: it is strict about types, places and sizes, and cheap. What it lets
    pass (a name given twice, names of control characters) is refused here.

    Raises:
        OSError: If the file cannot be read.
        UnfitFileError: If it is of another kind, damaged, or absurd.
    """
    size = check_file(path)
    with path.open("rb") as handle:
        start = handle.read(256)
        length = int.from_bytes(start[:8], "little")
        handle.seek(8)
        raw = handle.read(length) if length <= min(size - 8, MAX_HEADER_BYTES) else b""
    if start[8:9] == b"{" and MAX_HEADER_BYTES < length <= size - 8:
        raise UnfitFileError(f"has a header of {_megabytes(length)}, which no program writes")
    if not raw.startswith(b"{"):
        raise UnfitFileError(_what_it_is(start, size))
    if raw.count(b'"data_offsets"') > MAX_TENSORS:
        raise UnfitFileError(f"says that it holds more than {MAX_TENSORS:,} tensors, which no model has")
    try:
        with safe_open(path, framework="np"):
            pass
    except SafetensorError:
        raise UnfitFileError(_what_is_wrong(raw, size)) from None
    return _parse_header(raw, size)


def _parse_header(raw: bytes, size: int) -> Header:
    """Of a header whose types and places have been checked."""
    try:
        entries: dict[str, Any] = json.loads(raw, object_pairs_hook=_once)
        metadata: dict[str, str] = entries.pop("__metadata__", None) or {}
        shapes = {name: tuple(entry["shape"]) for name, entry in entries.items()}
        dtypes = {name: str(entry["dtype"]) for name, entry in entries.items()}
        places = {name: entry["data_offsets"] for name, entry in entries.items()}
        spans = {name: (8 + len(raw) + first, last - first) for name, (first, last) in places.items()}
    except UnfitFileError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UnfitFileError("has a damaged header") from None
    if len(metadata) > MAX_NOTES:
        raise UnfitFileError(f"has {len(metadata):,} entries in its metadata, which no program writes")
    for name in shapes:
        if not name.isprintable() or not 0 < len(name) <= MAX_NAME:
            raise UnfitFileError(f"holds a tensor with the name {name[:40]!r}, which no program writes")
    return Header(shapes, dtypes, metadata, size, spans)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose names are all different: of two alike, readers differ in which they take."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise UnfitFileError("has a damaged header: it gives a name twice")
    return found


def _what_is_wrong(raw: bytes, size: int) -> str:
    """Why the library refuses a file that has a header."""
    promised = 8 + len(raw) + max((int(match[1]) for match in _END.finditer(raw)), default=0)
    if promised == size:
        return "has a damaged header"
    kind = "incomplete" if size < promised else "damaged"
    return f"is {kind}: its header says {promised} bytes, it has {size}"


def _what_it_is(start: bytes, size: int) -> str:
    """A guess at a file that has no safetensors header."""
    if size == 0:
        return "is empty"
    if start.startswith((b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04")):
        return "is a pickle under another name, which can run code when opened"
    if start.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer, not the file itself"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "is a web page, not the file itself"
    length = int.from_bytes(start[:8], "little")
    if start[8:9] == b"{" and length < 100_000_000:
        return f"is incomplete: its header alone is {8 + length} bytes, the file has {size}"
    return "is no safetensors file"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
