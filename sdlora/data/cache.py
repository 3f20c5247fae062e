"""Keeps what the frozen parts of the base computed, under keys made from content."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from sdlora.data.buckets import Crop
from sdlora.data.images import parse_colour
from sdlora.data.records import ImageRecord
from sdlora.runs import write_file

CACHE_VERSION = 1
LATENTS, TEXT = "latents", "text"


def cache_folder() -> Path:
    """`SDLORA_CACHE`, else the user's cache folder as the platform has it."""
    given = os.environ.get("SDLORA_CACHE")
    if given:
        return Path(given).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "sdlora"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "sdlora" / "Cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sdlora"


def latent_key(record: ImageRecord, crop: Crop, *, vae_digest: str, background: str, dtype: str) -> str:
    """The key of a crop's latents; everything that changes them is in it (R-21)."""
    box = [crop.resized.width, crop.resized.height, crop.left, crop.top, crop.size.width, crop.size.height]
    return _make_key(LATENTS, record.digest, vae_digest, box, crop.flipped, parse_colour(background), dtype)


def text_key(caption: str, *, encoder_digest: str, dtype: str) -> str:
    """The key of a caption's hidden states; the empty caption has one too."""
    return _make_key(TEXT, caption, encoder_digest, dtype)


def _make_key(kind: str, *ingredients: Any) -> str:
    text = json.dumps([CACHE_VERSION, kind, *ingredients])
    return f"{kind}/{hashlib.sha256(text.encode('ascii')).hexdigest()}"


class TensorCache:
    """Named tensors for each key, one safetensors file a key, and a copy in memory.

    Args:
        folder: Where the files are; None keeps everything in memory.

    Attributes:
        problem: Why the last file could not be written, empty if all were; the copy in memory serves then.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.problem = ""
        self._memory: dict[str, dict[str, torch.Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Another process reads the files; only what has no file must travel.
        travels = self.folder is None or self.problem
        return {**self.__dict__, "_memory": self._memory if travels else {}}

    def get(self, key: str) -> dict[str, torch.Tensor] | None:
        """The tensors of a key, or None; not to be changed in place. A damaged file counts as missing."""
        if key not in self._memory and self.folder is not None:
            with suppress(OSError, SafetensorError, ValueError):
                self._memory[key] = _read_tensors(self._file(key))
        return self._memory.get(key)

    def put(self, key: str, tensors: dict[str, torch.Tensor]) -> None:
        """Stores tensors on the CPU; a disk that is full or not writable costs the file only."""
        kept = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        self._memory[key] = kept
        if self.folder is None:
            return
        file = self._file(key)
        try:
            write_file(file, lambda temporary: temporary.write_bytes(save(kept)), _read_tensors)
        except (OSError, SafetensorError) as error:
            self.problem = f"{file} cannot be written: {error}"

    def contains(self, key: str) -> bool:
        """Whether `get` would find the key; reads a file's header only."""
        if key in self._memory:
            return True
        if self.folder is None:
            return False
        try:
            # The header is checked against the file's size.
            with safe_open(self._file(key), framework="pt"):
                return True
        except (OSError, SafetensorError, ValueError):
            return False

    def _file(self, key: str) -> Path:
        kind, _, name = key.partition("/")
        assert self.folder is not None
        return self.folder / kind / name[:2] / f"{name}.safetensors"


def _read_tensors(file: Path) -> dict[str, torch.Tensor]:
    with safe_open(file, framework="pt") as handle:
        return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118


def measure_cache(folder: Path) -> list[tuple[str, int, int]]:
    """Rows (kind, files, bytes)."""
    rows = []
    for kind in (LATENTS, TEXT):
        sizes = [file.stat().st_size for file in (folder / kind).glob("*/*.safetensors")]
        rows.append((kind, len(sizes), sum(sizes)))
    return rows


def clear_cache(folder: Path) -> int:
    """Deletes the cache's own files, nothing else in that folder, and gives the bytes freed."""
    freed = 0
    for kind in (LATENTS, TEXT):
        for pattern in ("*/*.safetensors", "*/.*.safetensors.*.tmp"):
            for file in (folder / kind).glob(pattern):
                size = file.stat().st_size
                file.unlink(missing_ok=True)
                freed += size
        for empty in (*(folder / kind).glob("*"), folder / kind):
            with suppress(OSError):
                empty.rmdir()
    return freed
