"""Files that anybody may have made are refused in one line, at once (R-25, R-44)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sdlora.reading import MAX_HEADER_BYTES, UnfitFileError, read_bytes, read_header, read_json
from tests.checks import bounded


@contextmanager
def unfit(key: str, *shows: str) -> Iterator[None]:
    """Expects one line with this key, and these numbers or words in it."""
    with pytest.raises(UnfitFileError) as caught:
        yield
    assert caught.value.key == key
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 200
    for value in shows:
        assert value in str(caught.value)


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def write_container(path: Path, header: dict[str, Any] | bytes, size: int, length: int | None = None) -> Path:
    """A safetensors file with any header and `size` zero bytes behind it; `length` lies about the header."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    with path.open("wb") as handle:
        handle.write((len(raw) if length is None else length).to_bytes(8, "little") + raw)
        handle.truncate(8 + len(raw) + size)
    return path


TWICE = b"{" + b",".join([b'"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'] * 2) + b"}"
ABSURD = {
    "beyond the file": (
        {"a": entry([2], 0, 8), "b": entry([2], 8, 2**50)},
        16,
        None,
        "file.incomplete",
    ),
    "shorter than the shape": ({"a": entry([20], 0, 8)}, 8, None, "file.damaged"),
    "overlapping": ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, 12, None, "file.damaged"),
    "the same place": ({"a": entry([2], 0, 8), "b": entry([2], 0, 8)}, 8, None, "file.damaged"),
    "a hole": ({"a": entry([2], 0, 8), "b": entry([2], 16, 24)}, 24, None, "file.damaged"),
    "negative": ({"a": entry([2], -8, 0)}, 8, None, "file.damaged"),
    "product too large": ({"a": entry([2**40, 2**40], 0, 8)}, 8, None, "file.damaged"),
    "unknown dtype": ({"a": entry([2], 0, 8, "X9")}, 8, None, "file.damaged"),
    "a number as dtype": ({"a": {**entry([2], 0, 8), "dtype": 3}}, 8, None, "file.damaged"),
    "metadata of numbers": ({"__metadata__": {"x": 1}, "a": entry([2], 0, 8)}, 8, None, "file.damaged"),
    "a list": (b"[1, 2]", 8, None, "file.not-safetensors"),
    "nested deeply": (b'{"a":' + b"[" * 10**6, 8, None, "file.damaged"),
    "a number of many digits": (b'{"a":{"dtype":"F32","x":' + b"9" * 9999 + b"}}", 8, None, "file.damaged"),
    "a name twice": (TWICE, 8, None, "file.damaged"),
    "the longest header": ({"a": entry([2], 0, 8)}, 8, 2**64 - 1, "file.not-safetensors"),
    "a header beyond the file": ({"a": entry([2], 0, 8)}, 8, 10**6, "file.incomplete"),
    "a sparse header": ({"a": entry([2], 0, 8)}, 2**40, 2**39, "file.too-large"),
    "a control character": ({"a\x1b[2J": entry([2], 0, 8)}, 8, None, "file.name"),
    "a line break": ({"a\nb": entry([2], 0, 8)}, 8, None, "file.name"),
    "no name": ({"": entry([2], 0, 8)}, 8, None, "file.name"),
    "a long name": ({"a" * 501: entry([2], 0, 8)}, 8, None, "file.name"),
}


@pytest.mark.parametrize("case", ABSURD)
def test_absurd_headers(tmp_path: Path, case: str) -> None:
    """R-25: sizes, places, names and types that cannot be are one line, in bounded time and memory."""
    header, size, length, key = ABSURD[case]
    path = write_container(tmp_path / "x.safetensors", header, size, length)
    with bounded(megabytes=200), unfit(key):
        read_header(path)


def test_a_sound_header(tmp_path: Path) -> None:
    """R-25: what is whole is read, also where it is empty."""
    header = {"__metadata__": {"x": "y"}, "a": entry([2], 0, 8), "b": entry([], 8, 10, "BF16")}
    found = read_header(write_container(tmp_path / "x.safetensors", header, 10))
    assert found.shapes == {"a": (2,), "b": ()}
    assert found.dtypes == {"a": "F32", "b": "BF16"}
    assert found.metadata == {"x": "y"}
    assert found.num_bytes == (tmp_path / "x.safetensors").stat().st_size
    assert read_header(write_container(tmp_path / "y.safetensors", {}, 0)).shapes == {}


def test_metadata_of_100_mb(tmp_path: Path) -> None:
    """R-25: a header that is larger than any program's is refused without being read."""
    path = write_container(tmp_path / "x.safetensors", b'{"__metadata__":{"x":"', 10**8, 10**8)
    with bounded(megabytes=1), unfit("file.too-large", "100.0 MB"):
        read_header(path)


def test_millions_of_keys(tmp_path: Path) -> None:
    """R-25: a header full of small tensors is refused before it is parsed."""
    one = b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},'
    raw = b"{" + b"".join(one % number for number in range(250_000))[:-1] + b"}"
    assert len(raw) < MAX_HEADER_BYTES
    path = write_container(tmp_path / "x.safetensors", raw, 0)
    with bounded(megabytes=40), unfit("file.too-large", "100,000"):
        read_header(path)


def test_metadata_of_many_keys(tmp_path: Path) -> None:
    """R-25: `sdlora info` would print a line for each."""
    header = {"__metadata__": {str(number): "" for number in range(20_000)}, "a": entry([2], 0, 8)}
    path = write_container(tmp_path / "x.safetensors", header, 8)
    with bounded(megabytes=200), unfit("file.too-large", "20,000"):
        read_header(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes are a matter of POSIX")
def test_pipes_devices_and_folders(tmp_path: Path) -> None:
    """R-25: nothing waits for a pipe, or reads a device to its end."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for read in (read_header, lambda path: read_bytes(path, 10), lambda path: read_json(path, 10)):
        for name in ("pipe", "zero"):
            with unfit("file.irregular", "pipe"):
                read(tmp_path / name)
        with unfit("file.irregular", "folder"):
            read(tmp_path)
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "none")


def test_size_is_bounded(tmp_path: Path) -> None:
    """R-25: a file of a terabyte is refused by its size, one of the limit is read."""
    path = tmp_path / "a"
    path.write_bytes(b"x" * 1000)
    assert read_bytes(path, 1000) == b"x" * 1000
    with bounded(megabytes=1):
        assert read_bytes(path, 2**30) == b"x" * 1000, "without room for a gigabyte"
    with unfit("file.too-large", "1.0 kB"):
        read_bytes(path, 999)
    with path.open("rb+") as handle:
        handle.truncate(2**40)
    with bounded(megabytes=1), unfit("file.too-large", "1,099,511.6 MB", " 1.0 MB"):
        read_bytes(path, 10**6)


@pytest.mark.parametrize(
    ("content", "key"),
    [
        (b"{oops", "file.json"),
        (b"\xff\xfe\x00", "file.json"),
        (b"", "file.json"),
        (b"9" * 5000, "file.json"),
        (b"[" * 100_000, "file.nested"),
        (b'{"a":' * 100_000, "file.nested"),
    ],
)
def test_json(tmp_path: Path, content: bytes, key: str) -> None:
    """R-44: state in JSON that was damaged or made to hurt is one line."""
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with bounded(megabytes=200), unfit(key):
        read_json(path, 10**6)
    path.write_bytes(b'{"a": [1, "\xc3\xbc"]}')
    assert read_json(path, 10**6) == {"a": [1, "ü"]}
