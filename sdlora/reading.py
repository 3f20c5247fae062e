"""Reads untrusted files: with size limits, never from pipes or devices, validated before use."""

from __future__ import annotations

import json
import re
import stat
import tomllib
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
MAX_HEADER_BYTES = 16 * 2**20
MAX_TENSORS = 100_000
MAX_NOTES = 10_000
MAX_NAME = 500
MAX_DEPTH = 8
# Parsing a TOML key with thousands of dots takes minutes.
MAX_DOTS = 500
_END = re.compile(rb'"data_offsets"\s*:\s*\[\s*\d+\s*,\s*(\d{1,18})\s*\]')


class UnfitFileError(ValueError):
    """A file is refused.

    Args:
        reason: Completes the sentence "FILE ...".
        key: Stable name of the reason.
    """

    def __init__(self, reason: str, key: str = "file.invalid") -> None:
        super().__init__(reason)
        self.key = key


@dataclass(frozen=True, slots=True)
class Header:
    """The header of a safetensors file.

    Args:
        shapes: By tensor.
        dtypes: By tensor, as safetensors spells them: `F32`, `BF16` …
        metadata: The file's own.
        num_bytes: Size of the file.
        spans: First byte and number of bytes in the file, by tensor.
    """

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    metadata: dict[str, str]
    num_bytes: int
    spans: dict[str, tuple[int, int]]


def check_file(path: Path) -> int:
    """The size of a regular file, in bytes; raises an UnfitFileError for others, which might never end."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
        raise UnfitFileError(f"is {kind}, not a file", "file.irregular")
    return status.st_size


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """Reads a regular file of limited size; raises an UnfitFileError for others."""
    size = check_file(path)
    data = b""
    if size <= max_bytes:
        with path.open("rb") as handle:
            # Python allocates as much as is asked for, however small the file.
            data = handle.read(size + 1)
            if len(data) > size:
                data += handle.read(max_bytes + 1 - len(data))
        size = max(size, len(data))
    if size > max_bytes:
        raise UnfitFileError(
            f"is too large ({_megabytes(size)}; the limit is {_megabytes(max_bytes)})", "file.too-large"
        )
    return data


def read_json(path: Path, max_bytes: int) -> Any:
    return parse_json(read_bytes(path, max_bytes))


def parse_json(text: str | bytes) -> Any:
    """Parses untrusted JSON; raises an UnfitFileError if it is not JSON, or nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise UnfitFileError("is nested too deeply", "file.nested") from None
    except ValueError as error:  # Also for invalid UTF-8, and for integers with thousands of digits.
        raise UnfitFileError(f"is not JSON ({error})", "file.json") from None


def parse_toml(text: str) -> dict[str, Any]:
    """Parses untrusted TOML; raises an UnfitFileError if it is not TOML, or nested too deeply."""
    if any(line.count(".") > MAX_DOTS for line in text.split("\n")):
        raise UnfitFileError(f"has a line with more than {MAX_DOTS} dots", "file.nested")
    try:
        values = tomllib.loads(text)
    except RecursionError:
        raise UnfitFileError("is nested too deeply", "file.nested") from None
    except ValueError as error:  # Also for integers with thousands of digits.
        raise UnfitFileError(f"is not TOML: {error}", "file.toml") from None
    level: list[Any] = [values]
    for _ in range(MAX_DEPTH):
        items = chain.from_iterable(part.values() if isinstance(part, dict) else part for part in level)
        level = [item for item in items if isinstance(item, dict | list)]
    if level:
        raise UnfitFileError("is nested too deeply", "file.nested")
    return values


def read_header(path: Path) -> Header:
    """Reads the header of a safetensors file and checks that the file is complete.

    The library's own parser checks types, offsets and sizes first. It accepts duplicate names and control
    characters in names, which are refused here.

    Raises:
        OSError: If the file cannot be read.
        UnfitFileError: If it is another kind of file, damaged, or oversized.
    """
    size = check_file(path)
    with path.open("rb") as handle:
        start = handle.read(256)
        length = int.from_bytes(start[:8], "little")
        handle.seek(8)
        raw = handle.read(length) if length <= min(size - 8, MAX_HEADER_BYTES) else b""
    if start[8:9] == b"{" and MAX_HEADER_BYTES < length <= size - 8:
        limit = _megabytes(MAX_HEADER_BYTES)
        raise UnfitFileError(f"has a header of {_megabytes(length)}; the limit is {limit}", "file.too-large")
    if not raw.startswith(b"{"):
        raise _identify(start, size)
    if raw.count(b'"data_offsets"') > MAX_TENSORS:
        raise UnfitFileError(f"declares more than {MAX_TENSORS:,} tensors", "file.too-large")
    try:
        with safe_open(path, framework="np"):
            pass
    except SafetensorError:
        raise _describe_damage(raw, size) from None
    return _parse_header(raw, size)


def _parse_header(raw: bytes, size: int) -> Header:
    """Parses a header whose types and offsets have been checked."""
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
        raise UnfitFileError("has a damaged header", "file.damaged") from None
    if len(metadata) > MAX_NOTES:
        problem = f"has {len(metadata):,} metadata entries; the limit is {MAX_NOTES:,}"
        raise UnfitFileError(problem, "file.too-large")
    for name in shapes:
        if not name.isprintable() or not 0 < len(name) <= MAX_NAME:
            raise UnfitFileError(f"has a tensor with the invalid name {name[:40]!r}", "file.name")
    return Header(shapes, dtypes, metadata, size, spans)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object without duplicate names, which readers resolve differently."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise UnfitFileError("has a damaged header: a name occurs twice", "file.damaged")
    return found


def _describe_damage(raw: bytes, size: int) -> UnfitFileError:
    """Why safetensors refuses a file that has a header."""
    promised = 8 + len(raw) + max((int(match[1]) for match in _END.finditer(raw)), default=0)
    if promised == size:
        return UnfitFileError("has a damaged header", "file.damaged")
    kind = "incomplete" if size < promised else "damaged"
    sizes = f"{promised} bytes according to its header, but {size} on disk"
    return UnfitFileError(f"is {kind}: {sizes}", f"file.{kind}")


def _identify(start: bytes, size: int) -> UnfitFileError:
    """Guesses what a file without a safetensors header is."""
    if size == 0:
        return UnfitFileError("is empty", "file.empty")
    if start.startswith((b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04")):
        return UnfitFileError("is a renamed pickle, which can run code when opened", "file.pickle")
    if start.startswith(b"version https://git-lfs"):
        return UnfitFileError("is a git-lfs pointer, not the file itself", "file.git-lfs")
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return UnfitFileError("is a web page, not the file itself", "file.html")
    length = int.from_bytes(start[:8], "little")
    if start[8:9] == b"{" and length < 100_000_000:
        sizes = f"{8 + length} bytes for its header alone, but {size} on disk"
        return UnfitFileError(f"is incomplete: {sizes}", "file.incomplete")
    return UnfitFileError("is not a safetensors file", "file.not-safetensors")


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 1e6 else f"{size / 1e3:,.1f} kB"
