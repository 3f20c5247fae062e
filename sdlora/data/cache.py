"""A content-addressed cache of latents and text states."""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from sdlora.data.buckets import Crop
from sdlora.data.images import parse_color
from sdlora.data.records import ImageRecord
from sdlora.data.sources import ARCHIVES
from sdlora.reading import UnfitFileError, read_bytes, read_header, read_json
from sdlora.writing import cache_folder as cache_folder
from sdlora.writing import write_file, write_json

CACHE_VERSION = 2
DIGEST = "sha256"
MAX_BYTES, MAX_NOTES_BYTES = 2**28, 2**20
# Copies in memory: of what is used, and of what is only written or looked for.
MAX_KEPT, MAX_KEPT_AHEAD = 2**31, 2**26
DTYPES = {"F32", "F16", "BF16"}
TensorShapes = dict[str, tuple[int, ...]]
LATENTS, TEXT, IMAGES, LOOKS = "latents", "text", "images", "looks"
ENDINGS = {LATENTS: ".safetensors", TEXT: ".safetensors", IMAGES: ".png", LOOKS: ".npz"}
"""Kinds of entries: tensors, which this module reads and writes, the base's images (`sampling.store`), and
measures of training images (`data.image_checks`). `data.sources` adds folders."""


SPEEDS, COSTS, CHECKED = "speed.json", "costs.json", "checked.json"
"""Notes: small objects by key, of what was measured on this machine, computed, and found right of a base."""


def latent_key(record: ImageRecord, crop: Crop, *, vae_digest: str, background: str, dtype: str) -> str:
    """Key of the latents of a crop, and of its mask; contains everything that changes them."""
    box = [crop.resized.width, crop.resized.height, crop.left, crop.top, crop.size.width, crop.size.height]
    parts = [record.digest, vae_digest, box, crop.flipped, parse_color(background), dtype]
    parts += [record.mask.digest] if record.mask else []
    return _make_key(LATENTS, *parts, *([crop.colors] if crop.colors else []))


def text_key(caption: str, *, encoder_digest: str, dtype: str) -> str:
    """Key of the hidden states of a caption; the empty caption has one too."""
    return _make_key(TEXT, caption, encoder_digest, dtype)


def _make_key(kind: str, *ingredients: Any) -> str:
    text = json.dumps([CACHE_VERSION, kind, *ingredients])
    return f"{kind}/{hashlib.sha256(text.encode('ascii')).hexdigest()}"


class TensorCache:
    """Named tensors for each key: a safetensors file per key, and up to 2 GiB of copies in memory.

    Preparing a run keeps 64 MiB of them, so that its memory does not grow with the number of images. Without
    a folder, everything is kept in memory.

    Attributes:
        problem: Why the last file could not be written, or empty; the copy in memory is used instead.
        damaged: Files that differ from what was written; their content is computed again.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.problem = ""
        self.damaged: set[Path] = set()
        self._memory: dict[str, dict[str, torch.Tensor]] = {}
        self._num_bytes = 0

    def __getstate__(self) -> dict[str, Any]:
        # Another process reads the files; only tensors without a file must be sent.
        has_files = self.folder is not None and not self.problem
        return {**self.__dict__, "_memory": {}, "_num_bytes": 0} if has_files else self.__dict__

    def get(
        self, key: str, shapes: TensorShapes | None = None, *, is_ahead: bool = False
    ) -> dict[str, torch.Tensor] | None:
        """The tensors of a key, or None; they must not be changed in place.

        A file that is damaged, of other shapes, or that no encoder can have made, counts as missing.
        """
        if key not in self._memory and self.folder is not None:
            file = self._file(key)
            try:
                return self._keep(key, _read_tensors(file, shapes), is_ahead=is_ahead)
            except FileNotFoundError:
                return None
            except (OSError, UnfitFileError, SafetensorError):
                self.damaged.add(file)
        return self._memory.get(key)

    def put(self, key: str, tensors: dict[str, torch.Tensor]) -> None:
        """Stores tensors on the CPU; if the disk is full or not writable, in memory only."""
        kept = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        if self.folder is not None:
            file = self._file(key)
            try:
                write_file(file, lambda temporary: temporary.write_bytes(seal(kept)), _read_tensors)
            except (OSError, UnfitFileError, SafetensorError) as error:
                self.problem = f"{file} cannot be written: {error}"
        self._keep(key, kept, is_ahead=True)

    def _keep(self, key: str, tensors: dict[str, torch.Tensor], *, is_ahead: bool) -> dict[str, torch.Tensor]:
        """Keeps a copy in memory: ahead of its use if there is room, else in place of the oldest."""
        self._num_bytes -= _size(self._memory.pop(key, {}))
        has_file = self.folder is not None and not self.problem
        if has_file and is_ahead and self._num_bytes + _size(tensors) > MAX_KEPT_AHEAD:
            return tensors
        self._num_bytes += _size(tensors)
        self._memory[key] = tensors
        while has_file and self._num_bytes > MAX_KEPT:
            self._num_bytes -= _size(self._memory.pop(next(iter(self._memory))))
        return tensors

    def contains(self, key: str, shapes: TensorShapes | None = None) -> bool:
        return self.get(key, shapes, is_ahead=True) is not None

    def has_file(self, key: str) -> bool:
        """Whether the folder has a file for a key, whatever is in it."""
        return self.folder is not None and self._file(key).is_file()

    def _file(self, key: str) -> Path:
        kind, _, name = key.partition("/")
        assert self.folder is not None
        return self.folder / kind / name[:2] / f"{name}.safetensors"


def _size(tensors: dict[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def seal(tensors: dict[str, torch.Tensor]) -> bytes:
    """Bytes of an entry: its tensors, with the digest of their values in the metadata."""
    return save(tensors, {DIGEST: _digest(save(tensors))})


def _digest(entry: bytes) -> str:
    """sha256 of the values, which follow the header."""
    return hashlib.sha256(memoryview(entry)[8 + int.from_bytes(entry[:8], "little") :]).hexdigest()


def _read_tensors(file: Path, shapes: TensorShapes | None = None) -> dict[str, torch.Tensor]:
    """Reads an entry without mapping it: systems limit the number of mapped files."""
    header = read_header(file)
    if not DTYPES.issuperset(header.dtypes.values()) or any(0 in shape for shape in header.shapes.values()):
        raise UnfitFileError("was not made by an encoder")
    if shapes is not None and header.shapes != shapes:
        raise UnfitFileError("holds tensors of other shapes")
    data = read_bytes(file, MAX_BYTES)
    if header.metadata.get(DIGEST) != _digest(data):
        raise UnfitFileError("is not what was written")
    tensors: dict[str, torch.Tensor] = load(data)
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise UnfitFileError("holds values that are not finite")
    return tensors


def read_notes(name: str) -> dict[str, Any]:
    """All notes of a file; none if there is no file, or it cannot be read."""
    with suppress(OSError, UnfitFileError):
        found = read_json(cache_folder() / name, MAX_NOTES_BYTES)
        return found if isinstance(found, dict) else {}
    return {}


def add_note(name: str, key: str, value: Any) -> None:
    """Adds a note to those of a file; errors while writing the cache are ignored."""
    file = cache_folder() / name
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {**read_notes(name), key: value})


def measure_cache(folder: Path) -> list[tuple[str, int, int]]:
    """Rows (kind, files, bytes)."""
    files = {kind: _entries(folder / kind, f"*{ending}") for kind, ending in ENDINGS.items()}
    files[ARCHIVES] = _entries(folder / ARCHIVES, "**/*")
    return [(kind, len(found), sum(file.stat().st_size for file in found)) for kind, found in files.items()]


def trim_cache(folder: Path, most_bytes: int) -> None:
    """Deletes the files of one kind that were not used for the longest time, down to a size."""
    files = [(file.stat().st_mtime, file.stat().st_size, file) for file in _entries(folder, "*")]
    left = sum(size for _, size, _ in files)
    for _, size, file in sorted(files):
        if left <= most_bytes:
            break
        file.unlink(missing_ok=True)
        left -= size


def clear_cache(folder: Path) -> int:
    """Deletes the files of the cache and nothing else; returns the bytes freed."""
    freed = sum(file.stat().st_size for file in _entries(folder / ARCHIVES, "**/*"))
    if not (folder / ARCHIVES).is_symlink():
        shutil.rmtree(folder / ARCHIVES, ignore_errors=True)
    for notes in (folder / COSTS, folder / CHECKED):
        if not notes.is_symlink():
            notes.unlink(missing_ok=True)
    for kind, ending in ENDINGS.items():
        for file in _entries(folder / kind, f"*{ending}", f".*{ending}.*.tmp"):
            freed += file.stat().st_size
            file.unlink(missing_ok=True)
        for empty in (*(folder / kind).glob("*"), folder / kind):
            with suppress(OSError):
                empty.rmdir()
    return freed


def _entries(folder: Path, *patterns: str) -> list[Path]:
    """Files of one kind. Links in the cache folder are not sdlora's and are ignored."""
    if folder.is_symlink():
        return []
    inner = [path for path in folder.glob("*") if path.is_dir() and not path.is_symlink()]
    found = (file for path in inner for pattern in patterns for file in path.glob(pattern))
    return [file for file in found if file.is_file() and not file.is_symlink()]
