"""The safetensors file itself: checked before it is read, and the same bytes for the same content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from sdlora.errors import AdapterError

_PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
}


@dataclass(frozen=True, slots=True)
class Header:
    """The header of a safetensors file."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    metadata: dict[str, str]
    num_bytes: int
    """Size of the file."""


def read_header(path: Path) -> Header:
    """Reads the header of a safetensors file and checks that the file is complete (R-25, R-44).

    Raises:
        AdapterError: If the file is missing, of another kind, or shorter or longer than its header says.
    """
    if path.is_dir():
        raise AdapterError(f"{path} is a folder; give a LoRA .safetensors file")
    if path.suffix.lower() in _PICKLES:
        raise AdapterError(
            f"{path} is a {path.suffix} file, which is a pickle and can run code when opened; "
            "sdlora reads .safetensors only, so get or convert it to that"
        )
    try:
        size = path.stat().st_size
        with path.open("rb") as handle:
            start = handle.read(8)
            length = int.from_bytes(start, "little")
            raw = handle.read(length) if len(start) == 8 and length <= size - 8 else b""
    except FileNotFoundError:
        raise AdapterError(f"LoRA file {path} does not exist; give a .safetensors file") from None
    except OSError as error:
        raise AdapterError(f"LoRA file {path} cannot be read: {error.strerror}") from None
    if not raw.startswith(b"{"):
        raise AdapterError(f"{path} {_what_it_is(path, size)}; get the file again")
    try:
        header: dict[str, Any] = json.loads(raw)
        metadata = {str(key): str(value) for key, value in header.pop("__metadata__", {}).items()}
        promised = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
        dtypes = {name: str(entry["dtype"]) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise AdapterError(f"{path} has a damaged header; get the file again") from None
    if promised != size:
        kind = "incomplete" if size < promised else "damaged"
        raise AdapterError(
            f"{path} is {kind}: its header says {promised} bytes, it has {size}; get the file again"
        )
    return Header(shapes, dtypes, metadata, size)


def _what_it_is(path: Path, size: int) -> str:
    """A guess at a file that has no safetensors header."""
    with path.open("rb") as handle:
        start = handle.read(256)
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


def read_tensors(path: Path) -> tuple[dict[str, Tensor], Header]:
    """Reads a complete safetensors file onto the CPU.

    Raises:
        AdapterError: As `read_header`.
    """
    header = read_header(path)
    try:
        return load_file(path), header
    except Exception as error:
        raise AdapterError(f"{path} is damaged: {error}; get the file again") from None


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file whose bytes depend on its content alone.

    The reference writer orders the metadata at random and gives the file mode 600, which keeps a web
    interface of another user out. `sshs_model_hash`, the SHA-256 of the tensor bytes that user interfaces
    show, is added here.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    chunks = [_tensor_bytes(tensors[name]) for name in names]
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    header: dict[str, Any] = {
        "__metadata__": dict(sorted({**metadata, "sshs_model_hash": digest.hexdigest()}.items()))
    }
    offset = 0
    for name, chunk in zip(names, chunks, strict=True):
        tensor = tensors[name]
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + len(chunk)],
        }
        offset += len(chunk)
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as handle:
        handle.write(len(raw).to_bytes(8, "little"))
        handle.write(raw)
        handle.writelines(chunks)


def _tensor_bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()
