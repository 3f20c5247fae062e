"""The safetensors file itself: checked before it is read, and the same bytes for the same content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from sdlora.dtypes import STORED, STORED_NAMES
from sdlora.errors import AdapterError
from sdlora.reading import PICKLES, Header, UnfitFileError, read_header

MAX_BYTES = 16 * 10**9
_READABLE = STORED.keys() - {"BOOL"}


def read_lora_header(path: Path) -> Header:
    """Reads the header of a LoRA file and checks that the file is complete (R-25, R-44).

    Raises:
        AdapterError: If the file is missing, of another kind, damaged, or holds what no LoRA holds.
    """
    if path.suffix.lower() in PICKLES:
        raise AdapterError(
            f"{path} is a {path.suffix} file, which is a pickle and can run code when opened; use or "
            "convert to a .safetensors file"
        )
    try:
        header = read_header(path)
    except FileNotFoundError:
        raise AdapterError(f"LoRA file {path} does not exist; use a .safetensors file") from None
    except OSError as error:
        raise AdapterError(f"cannot read LoRA file {path}: {error.strerror}") from None
    except UnfitFileError as error:
        raise AdapterError(f"{path} {error}; download or copy it again", key=error.key) from None
    _check_tensors(path, header)
    return header


def _check_tensors(path: Path, header: Header) -> None:
    """Refuses sizes, dtypes and shapes that would cost much or fail later, before a byte is read."""
    if header.num_bytes > MAX_BYTES:
        raise AdapterError(
            f"{path} has {header.num_bytes / 1e9:.1f} GB, too large for a LoRA; use a LoRA file"
        )
    for name, shape in header.shapes.items():
        if header.dtypes[name] not in _READABLE:
            raise AdapterError(f"{path} has {name} in the unsupported dtype {header.dtypes[name]}")
        if 0 in shape:
            raise AdapterError(
                f"{path} has an empty tensor {name} of shape {shape}; download or copy it again"
            )


def read_tensors(path: Path) -> tuple[dict[str, Tensor], Header]:
    """Reads a complete safetensors file onto the CPU.

    Raises:
        AdapterError: As `read_lora_header`.
    """
    header = read_lora_header(path)
    try:
        return load_file(path), header
    except Exception as error:
        raise AdapterError(f"{path} is damaged: {error}; download or copy it again") from None


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file whose bytes depend on its content alone.

    The reference writer orders the metadata at random and gives the file mode 600, which keeps a web
    interface of another user out. The hashes that user interfaces show are added here.
    """
    digest = digest_tensors(tensors)
    texts = {**metadata, "sshs_model_hash": digest, "sshs_legacy_hash": _legacy_hash(tensors, metadata)}
    if "modelspec.sai_model_spec" in metadata:
        texts["modelspec.hash_sha256"] = f"0x{digest}"
    with path.open("wb") as handle:
        handle.write(_header_bytes(tensors, texts))
        handle.writelines(_tensor_bytes(tensors[name]) for name in _in_order(tensors))


def header_bytes(
    tensors: Iterable[tuple[str, torch.dtype, Sequence[int]]], metadata: Mapping[str, str]
) -> bytes:
    """The start of a safetensors file, its length included.

    Args:
        tensors: Name, dtype and shape, in the order of their bytes.
        metadata: Written in this order.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, dtype, shape in tensors:
        end = offset + dtype.itemsize * prod(shape)
        header[name] = {"dtype": STORED_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def _header_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    listed = ((name, tensors[name].dtype, tensors[name].shape) for name in _in_order(tensors))
    return header_bytes(listed, dict(sorted(metadata.items())))


def _legacy_hash(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """The older short hash of kohya's tools: of 64 KiB behind the first MiB, were there only `ss_` keys."""
    start, end = 0x100000, 0x110000
    texts = {key: text for key, text in metadata.items() if key.startswith("ss_")}
    content = bytearray(_header_bytes(tensors, texts))
    for name in _in_order(tensors):
        if len(content) >= end:
            break
        content += _tensor_bytes(tensors[name])
    return hashlib.sha256(content[start:end]).hexdigest()[:8]


def digest_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the tensors' bytes in the order of a file: of all of it behind its header."""
    digest = hashlib.sha256()
    for name in _in_order(tensors):
        digest.update(_tensor_bytes(tensors[name]))
    return digest.hexdigest()


def _in_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Wide numbers first, then by name, as the reference writer does."""
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def _tensor_bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()
