"""Weight files on the disk: found, checked for completeness and fingerprinted, without loading them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

from sdlora.errors import ModelError

PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
VARIANTS = (".fp16", ".bf16")
MAX_HEADER_BYTES = 100 * 2**20
WINDOW_BYTES = 2**20
WINDOWS = 64


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """The tensor table of a safetensors file: name to dtype, shape and place.

    Raises:
        ModelError: If the file is no safetensors file, or shorter or longer than its header says (R-25).
    """
    size = path.stat().st_size
    with path.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        raw = handle.read(length) if length <= MAX_HEADER_BYTES else b""
    if not size:
        raise ModelError(f"{path} is empty; download or copy it again")
    if not raw.startswith(b"{"):
        raise ModelError(_not_safetensors(path))
    if len(raw) < length:
        raise ModelError(_cut_short(path, size, f"more than {8 + length:,}"))
    try:
        header: dict[str, Any] = json.loads(raw)
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ModelError(_not_safetensors(path)) from None
    if size < 8 + length + end:
        raise ModelError(_cut_short(path, size, f"{8 + length + end:,}"))
    if size > 8 + length + end:
        raise ModelError(
            f"{path} is damaged: {size:,} bytes where its header says {8 + length + end:,}; copy it again"
        )
    return header


def _not_safetensors(path: Path) -> str:
    return f"{path} is not a safetensors file, whatever its name says; download or copy it again"


def _cut_short(path: Path, size: int, expected: str) -> str:
    return (
        f"{path} is incomplete: {size:,} bytes of {expected} (the download was cut short); "
        "download or copy it again"
    )


def find_weights(folder: Path, stem: str, key: str) -> list[Path]:
    """The safetensors files of one part of a base, in order.

    Args:
        folder: The part's folder, such as `BASE/unet`.
        stem: `diffusion_pytorch_model` or `model`.
        key: The setting with its value, to open the error message with.

    Raises:
        ModelError: If there are none, if a shard is missing, or if there are only pickles (R-44).
    """
    whole = folder / f"{stem}.safetensors"
    if whole.is_file():
        return [whole]
    index = folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        shards = sorted(set(read_json(index).get("weight_map", {}).values()))
        missing = [name for name in shards if not (folder / name).is_file()]
        if missing or not shards:
            raise ModelError(
                f"{key} is incomplete: {folder} lacks {', '.join(missing) or 'all shards'}; "
                "download or copy it again"
            )
        return [folder / name for name in shards]
    names = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
    variants = [name for name in names if any(name == f"{stem}{v}.safetensors" for v in VARIANTS)]
    if variants:
        raise ModelError(
            f"{key} has only {folder.name}/{variants[0]}; this version reads plain file names: "
            f"rename it to {stem}.safetensors"
        )
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles:
        raise ModelError(
            f"{key} has only {folder.name}/{pickles[0]}, a pickle, which can run any code when it is read; "
            "give a base with .safetensors files"
        )
    raise ModelError(
        f"{key} is incomplete: {whole} is missing (beside it: {', '.join(names[:5]) or 'nothing'}); "
        "download or copy it again"
    )


def count_parameters(files: Iterable[Path]) -> int:
    """How many numbers the files hold, read from their headers."""
    return sum(prod(entry["shape"]) for file in files for entry in read_header(file).values())


def digest_weights(files: Iterable[Path], *configs: Mapping[str, Any]) -> str:
    """Fingerprint of one part of a base: sha256 over its files and the settings that decide what they do.

    A file of up to 64 MiB is read in full, of a larger one its size and 64 windows of one MiB, evenly
    spread from the header to the last byte: a 3 GB UNet takes a tenth of a second instead of ten, and
    two trainings of one architecture differ in every window.
    """
    sha = hashlib.sha256()
    for config in configs:
        own = {key: value for key, value in config.items() if not key.startswith("_")}
        sha.update(json.dumps(own, sort_keys=True).encode())
    for file in files:
        size = file.stat().st_size
        sha.update(size.to_bytes(8, "little"))
        whole = size <= WINDOWS * WINDOW_BYTES
        last = 0 if whole else size - WINDOW_BYTES
        starts = [0] if whole else [last * number // (WINDOWS - 1) for number in range(WINDOWS)]
        with file.open("rb") as handle:
            for start in starts:
                handle.seek(start)
                sha.update(handle.read(size if whole else WINDOW_BYTES))
    return sha.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        ModelError: If the file is missing, unreadable or something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} is missing; the base is incomplete, download or copy it again") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read ({error}); download or copy it again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} is not a JSON object; download or copy it again")
    return value
