"""The safetensors file itself: checked before it is read, and the same bytes for the same content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
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
    """Reads the header of a LoRA file and checks that the file is complete.

    Raises an AdapterError if it is missing or damaged, or has sizes, dtypes or shapes that would cost much or
    fail later, before a tensor is read.
    """
    if path.suffix.lower() in PICKLES:
        raise AdapterError(
            f"{path} is a {path.suffix} file, which is a pickle and can run code when opened; use or "
            "convert to a .safetensors file",
            key="file.pickle",
        )
    try:
        header = read_header(path)
    except OSError as error:
        problem = f"cannot read LoRA file {path}: {error.strerror}; use another path"
        raise AdapterError(problem, key="file.unreadable") from None
    except UnfitFileError as error:
        raise AdapterError(f"{path} {error}; download or copy it again", key=error.key) from None
    if header.num_bytes > MAX_BYTES:
        problem = f"{path} has {header.num_bytes / 1e9:.1f} GB, too large for a LoRA; use a LoRA file"
        raise AdapterError(problem, key="file.too-large")
    for name, shape in header.shapes.items():
        if header.dtypes[name] not in _READABLE:
            problem = f"{path} has {name} in the unsupported dtype {header.dtypes[name]}"
            raise AdapterError(problem, key="lora.dtype")
        if 0 in shape:
            problem = f"{path} has an empty tensor {name} of shape {shape}; download or copy it again"
            raise AdapterError(problem, key="lora.shapes")
    return header


def read_tensors(path: Path) -> tuple[dict[str, Tensor], Header]:
    """Reads a complete safetensors file onto the CPU; raises an AdapterError as `read_lora_header` does."""
    header = read_lora_header(path)
    try:
        return load_file(path), header
    except Exception as error:
        problem = f"{path} is damaged: {error}; download or copy it again"
        raise AdapterError(problem, key="file.damaged") from None


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file whose bytes depend on its content alone, with the hashes that web UIs show.

    The reference writer orders the metadata at random and gives the file mode 600, which keeps a web
    interface of another user out.
    """
    tensors = _in_order(tensors)
    digest = digest_tensors(tensors)
    texts = {**metadata, "sshs_model_hash": digest, "sshs_legacy_hash": _legacy_hash(tensors, metadata)}
    if "modelspec.sai_model_spec" in metadata:
        texts["modelspec.hash_sha256"] = f"0x{digest}"
    with path.open("wb") as handle:
        handle.write(header_bytes(tensors, dict(sorted(texts.items()))))
        handle.writelines(map(_tensor_bytes, tensors.values()))


def header_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The start of a safetensors file, its length included; names in the order of the tensors' bytes.

    Only dtypes and shapes are read, so the tensors may be on the meta device.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.nbytes
        kind = STORED_NAMES[tensor.dtype]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def _legacy_hash(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """The older short hash of kohya's tools: of 64 KiB behind the first MiB, were there only `ss_` keys."""
    start, end = 0x100000, 0x110000
    texts = {key: text for key, text in sorted(metadata.items()) if key.startswith("ss_")}
    content = bytearray(header_bytes(tensors, texts))
    for tensor in tensors.values():
        if len(content) >= end:
            break
        content += _tensor_bytes(tensor)
    return hashlib.sha256(content[start:end]).hexdigest()[:8]


def digest_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the tensors' bytes in the order of a file: of all of it behind its header."""
    digest = hashlib.sha256()
    for tensor in _in_order(tensors).values():
        digest.update(_tensor_bytes(tensor))
    return digest.hexdigest()


def _in_order(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Wide numbers first, then by name, as the reference writer does."""
    return dict(sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))


def _tensor_bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
