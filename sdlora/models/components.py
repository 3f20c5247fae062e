"""Components of a base on disk: files, completeness and fingerprints, without loading weights."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any, TypeAlias

from sdlora import reading
from sdlora.errors import ModelError
from sdlora.reading import PICKLES, Header, UnfitFileError

VARIANTS = ("fp16", "bf16")
MAX_JSON_BYTES = 32 * 2**20
WINDOW_BYTES = 2**20
WINDOWS = 64
AGAIN = "download or copy it again"
FORMATS = {"F32": "f", "BF16": "f", "F16": "e"}

# Neighbouring bytes: file, first byte, number of bytes.
Span: TypeAlias = tuple[Path, int, int]


@dataclass(frozen=True, eq=False)
class Component:
    """A denoiser, a VAE or a text encoder.

    Args:
        name: Its name in diffusers, such as `text_encoder_2`.
        config: Contents of its `config.json`, inferred from the shapes in a single file.
        files: The safetensors files with its weights.
        digest: Fingerprint of its weights and its configuration.
        folder: Its folder in the diffusers layout; None in a single file.
        variant: Precision in the names of the folder's files, such as `fp16`.
        prefix: Prefix of its tensors in a single file.
    """

    name: str
    config: Mapping[str, Any] = field(repr=False)
    files: tuple[Path, ...]
    digest: str
    num_parameters: int
    folder: Path | None = None
    variant: str | None = None
    prefix: str = ""

    @property
    def path(self) -> Path:
        """The folder or the single file, for messages."""
        return self.folder or self.files[0]


@dataclass(frozen=True, eq=False)
class TokenizerSpec:
    """A tokenizer: folder, fingerprint, settings that the folder lacks, longest prompt in tokens."""

    folder: Path
    digest: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    length: int | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class BaseFiles:
    """A base on disk.

    Args:
        path: The diffusers folder, or the single file.
        family: Its name in the table of families.
        components: UNet, VAE and text encoders by their names in diffusers; a single file may lack the VAE.
        tokenizers: One for each text encoder.
        scheduler_config: Betas and prediction type.
        zeroes_empty_prompt: Whether its pipeline uses zeros for the text states of an empty prompt.
        notices: Assumptions to print.
    """

    path: Path
    family: str
    components: Mapping[str, Component]
    tokenizers: tuple[TokenizerSpec, ...]
    scheduler_config: Mapping[str, Any] = field(repr=False)
    zeroes_empty_prompt: bool = False
    notices: tuple[str, ...] = ()


def read_tokenizer_spec(
    folder: Path, settings: Mapping[str, Any], length: int | None = None
) -> TokenizerSpec:
    """The tokenizer of a folder, with settings that the folder lacks."""
    files = [file for file in sorted(folder.iterdir()) if file.suffix in (".json", ".txt")]
    if (config := folder / "tokenizer_config.json") in files:
        length = read_json(config).get("model_max_length")
    return TokenizerSpec(folder, digest_weights(files, settings), settings, int(length) if length else None)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Names the file and the remedy in errors of reading."""
    try:
        yield
    except UnfitFileError as error:
        raise ModelError(f"{path} {error}; {AGAIN}", key=error.key) from None
    except OSError as error:
        raise ModelError(f"cannot read {path} ({error.strerror}); {AGAIN}", key="base.unreadable") from None


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; raises a ModelError for other files."""
    with _reading(path):
        value = reading.read_json(path, MAX_JSON_BYTES)
        if not isinstance(value, dict):
            raise UnfitFileError("is not a JSON object", "file.json")
        return value


def read_header(path: Path) -> Header:
    """Reads the header of a complete safetensors file; raises a ModelError for other files."""
    with _reading(path):
        return reading.read_header(path)


def spans_of(path: Path, header: Header, prefix: str) -> list[Span]:
    """The bytes of the tensors with a prefix; neighbours are one span."""
    spans: list[Span] = []
    for start, size in sorted(at for name, at in header.spans.items() if name.startswith(prefix)):
        if spans and start == spans[-1][1] + spans[-1][2]:
            spans[-1] = (path, spans[-1][1], spans[-1][2] + size)
        else:
            spans.append((path, start, size))
    return spans


def read_values(path: Path, header: Header, name: str) -> list[float]:
    """Reads a small tensor of fp32, fp16 or bf16 without torch; raises a ModelError for other dtypes."""
    start, size = header.spans[name]
    with path.open("rb") as handle:
        handle.seek(start)
        raw = handle.read(size)
    kind = header.dtypes[name]
    if kind not in FORMATS:
        raise ModelError(
            f"{path}: {name} is stored as {kind}; use a file in fp32, fp16 or bf16", key="base.dtype"
        )
    if kind == "BF16":  # the upper half of a float32
        raw = b"".join(b"\0\0" + raw[place : place + 2] for place in range(0, size, 2))
    return list(struct.unpack(f"<{prod(header.shapes[name])}{FORMATS[kind]}", raw))


def check_dtypes(header: Header, key: str, prefix: str = "") -> None:
    """Refuses weights that are packed into integers."""
    kinds = {kind for name, kind in header.dtypes.items() if name.startswith(prefix)}
    if packed := kinds & {"U8", "I8"}:
        raise ModelError(
            f"{key} is already quantized (its weights are {', '.join(sorted(packed))}); "
            "use the same base in fp16 or fp32",
            key="base.quantized",
        )


def has_weights(folder: Path, stem: str, variant: str | None = None) -> bool:
    """Whether a folder has weights in a precision, or in any; see `find_weights`."""
    kinds = (variant,) if variant else (None, *VARIANTS)
    return any(file.is_file() for kind in kinds for file in _weight_files(folder, stem, kind))


def find_weights(
    folder: Path, stem: str, key: str, variant: str | None = None
) -> tuple[list[Path], str | None]:
    """The safetensors files of a component, in order, and the precision in their names.

    A `variant`, `fp16` or `bf16`, is preferred to plain files, and those to any other. `stem` is
    `diffusion_pytorch_model` or `model`.
    """
    for kind in dict.fromkeys((variant, None, *VARIANTS)):
        whole, index = _weight_files(folder, stem, kind)
        if whole.is_file():
            return [whole], kind
        if index.is_file():
            return _find_shards(index, key), kind
    names = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
    if pickles := [name for name in names if name.endswith(PICKLES)]:
        raise ModelError(
            f"{key} has only {folder.name}/{pickles[0]}, a pickle, which can run code when opened; "
            "use a base with .safetensors files",
            key="base.pickle",
        )
    raise ModelError(
        f"{key} is incomplete: {folder / stem}.safetensors is missing "
        f"(the folder has {', '.join(names[:5]) or 'no files'}); {AGAIN}",
        key="base.incomplete",
    )


def _weight_files(folder: Path, stem: str, kind: str | None) -> tuple[Path, Path]:
    """Paths of the weights in one file, and of the index of shards."""
    dotted = f".{kind}" if kind else ""
    return folder / f"{stem}{dotted}.safetensors", folder / f"{stem}.safetensors.index{dotted}.json"


def _find_shards(index: Path, key: str) -> list[Path]:
    table = read_json(index).get("weight_map")
    names = sorted(set(map(str, table.values()))) if isinstance(table, dict) else []
    if outside := [name for name in names if Path(name).name != name]:
        raise ModelError(
            f"{index} names {outside[0]!r}, which is not in its folder; use another copy of the base",
            key="base.foreign-file",
        )
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing or not names:
        raise ModelError(
            f"{key} is incomplete: {index.parent} lacks {', '.join(missing) or 'all shards'}; {AGAIN}",
            key="base.incomplete",
        )
    return [index.parent / name for name in names]


def digest_weights(spans: Iterable[Span | Path], *configs: Mapping[str, Any]) -> str:
    """Fingerprint of a component: sha256 over its bytes and its settings, without those that begin with `_`.

    A file or span of up to 64 MiB is read in full. Of a larger one the size and 64 windows of one MiB are
    read, evenly spread from the first to the last byte: 3 GB take a tenth of a second instead of ten, and two
    trainings of one architecture differ in every window.
    """
    sha = hashlib.sha256()
    for config in configs:
        own = {key: value for key, value in config.items() if not key.startswith("_")}
        sha.update(json.dumps(own, sort_keys=True).encode())
    for span in spans:
        path, start, size = (span, 0, span.stat().st_size) if isinstance(span, Path) else span
        sha.update(size.to_bytes(8, "little"))
        count, length = (1, size) if size <= WINDOWS * WINDOW_BYTES else (WINDOWS, WINDOW_BYTES)
        with path.open("rb") as handle:
            for number in range(count):
                handle.seek(start + (size - length) * number // max(count - 1, 1))
                sha.update(handle.read(length))
    return sha.hexdigest()


@lru_cache(maxsize=4)
def kohya_hashes(path: Path) -> tuple[str, str]:
    """The hashes of a single-file base in web UIs: the old one, of 64 KiB, and sha256; 2 GB take a second."""
    with path.open("rb") as handle:
        handle.seek(0x100000)
        old = hashlib.sha256(handle.read(0x10000)).hexdigest()[:8]
        handle.seek(0)
        return old, hashlib.file_digest(handle, "sha256").hexdigest()
