"""Components of a base on the disk: files, completeness and fingerprints, without loading weights."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

from sdlora import reading
from sdlora.errors import ModelError
from sdlora.reading import PICKLES, Header, UnfitFileError

VARIANTS = ("fp16", "bf16")
MAX_JSON_BYTES = 32 * 2**20
WINDOW_BYTES = 2**20
WINDOWS = 64


@dataclass(frozen=True, eq=False)
class Component:
    """A denoiser, a VAE or a text encoder.

    Args:
        name: As diffusers calls it, such as `text_encoder_2`.
        config: What its `config.json` says, or would say.
        files: The safetensors files that hold its weights.
        digest: Fingerprint of its weights and its configuration.
        num_parameters: How many numbers it has.
        folder: The folder that diffusers or transformers loads it from; None in a single file.
        variant: What stands in the names of the folder's files, such as `fp16`.
        prefix: Of its tensors in a single file.
    """

    name: str
    config: Mapping[str, Any] = field(repr=False)
    files: tuple[Path, ...]
    digest: str
    num_parameters: int
    folder: Path | None = None
    variant: str | None = None
    prefix: str = ""


@dataclass(frozen=True, eq=False)
class TokenizerSpec:
    """A tokenizer.

    Args:
        folder: With its vocabulary.
        digest: Fingerprint of its files and settings.
        settings: What the folder does not say, such as `pad_token`.
        length: The longest prompt in tokens that it allows; None if it sets no limit.
    """

    folder: Path
    digest: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    length: int | None = None


@dataclass(frozen=True, eq=False)
class BaseFiles:
    """A base as it lies on the disk.

    Args:
        path: The folder, or the file.
        family: Its name in the table of families.
        components: By diffusers' names; a single file may lack the VAE.
        tokenizers: One for each text encoder.
        scheduler_config: Betas and prediction type.
        zeroes_empty_prompt: Whether its pipeline takes zeros for the text states of an empty prompt.
        notices: What had to be assumed, for people.
    """

    path: Path
    family: str
    components: Mapping[str, Component]
    tokenizers: tuple[TokenizerSpec, ...]
    scheduler_config: Mapping[str, Any] = field(repr=False)
    zeroes_empty_prompt: bool = False
    notices: tuple[str, ...] = ()


def read_tokenizer_spec(folder: Path, settings: Mapping[str, Any], length: int | None) -> TokenizerSpec:
    """The tokenizer of a folder; see `TokenizerSpec`."""
    files = [file for file in sorted(folder.iterdir()) if file.suffix in (".json", ".txt")]
    return TokenizerSpec(folder, digest_weights(files, settings), settings, length)


@dataclass(frozen=True, slots=True)
class Span:
    """Neighbouring bytes of a file."""

    path: Path
    start: int
    size: int


def read_header(path: Path) -> Header:
    """The header of a safetensors file that is whole (R-25).

    Raises:
        ModelError: If it is another kind of file, or its size differs from what the header says.
    """
    try:
        return reading.read_header(path)
    except UnfitFileError as error:
        raise ModelError(f"{path} {error}; download or copy it again", key=error.key) from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}); download or copy it again") from None


def spans_of(path: Path, header: Header, prefix: str) -> list[Span]:
    """Where the tensors with a prefix lie in a file; neighbours are one span."""
    spans: list[Span] = []
    for start, size in sorted(at for name, at in header.spans.items() if name.startswith(prefix)):
        if spans and start == spans[-1].start + spans[-1].size:
            spans[-1] = Span(path, spans[-1].start, spans[-1].size + size)
        else:
            spans.append(Span(path, start, size))
    return spans


def read_values(path: Path, header: Header, name: str) -> list[float]:
    """The numbers of one small tensor.

    Raises:
        ModelError: If they are not floating point numbers of 16 or 32 bits.
    """
    start, size = header.spans[name]
    with path.open("rb") as handle:
        handle.seek(start)
        raw = handle.read(size)
    kind, codes = header.dtypes[name], {"F32": "f", "BF16": "f", "F16": "e"}
    if kind not in codes:
        raise ModelError(f"{path}: {name} is stored as {kind}; give a file in fp32, fp16 or bf16")
    if kind == "BF16":  # the upper half of a float32
        raw = b"".join(b"\0\0" + raw[place : place + 2] for place in range(0, size, 2))
    return list(struct.unpack(f"<{prod(header.shapes[name])}{codes[kind]}", raw))


def check_dtypes(header: Header, key: str, prefix: str = "") -> None:
    """Refuses weights that are no plain numbers.

    Raises:
        ModelError: If some are packed into integers.
    """
    kinds = {kind for name, kind in header.dtypes.items() if name.startswith(prefix)}
    if packed := kinds & {"U8", "I8"}:
        raise ModelError(
            f"{key} is quantised already (its weights are {', '.join(sorted(packed))}); "
            "give it in fp16 or fp32"
        )


def has_weights(folder: Path, stem: str, variant: str | None = None) -> bool:
    """Whether a part's folder holds its weights in a precision, or in any; see `find_weights`."""
    kinds = (variant,) if variant else (None, *VARIANTS)
    return any(place.is_file() for kind in kinds for place in _places(folder, stem, kind))


def find_weights(
    folder: Path, stem: str, key: str, variant: str | None = None
) -> tuple[list[Path], str | None]:
    """The safetensors files of one part of a base, in order, and what their names say of the precision.

    Args:
        folder: The part's folder, such as `BASE/vae`.
        stem: `diffusion_pytorch_model` or `model`.
        key: The setting with its value, to open the error message with.
        variant: `fp16` or `bf16`, to be taken before the plain files where it is there.

    Raises:
        ModelError: If there are none, if a shard is missing, or if there are only pickles (R-44).
    """
    for kind in dict.fromkeys((variant, None, *VARIANTS)):
        whole, index = _places(folder, stem, kind)
        if whole.is_file():
            return [whole], kind
        if index.is_file():
            return _find_shards(index, key), kind
    names = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles:
        raise ModelError(
            f"{key} has only {folder.name}/{pickles[0]}, a pickle, which can run any code when it is read; "
            "give a base with .safetensors files"
        )
    raise ModelError(
        f"{key} is incomplete: {folder / stem}.safetensors is missing "
        f"(beside it: {', '.join(names[:5]) or 'nothing'}); download or copy it again"
    )


def _places(folder: Path, stem: str, kind: str | None) -> tuple[Path, Path]:
    """Of the weights in one file, and of the index of those in several."""
    dotted = f".{kind}" if kind else ""
    return folder / f"{stem}{dotted}.safetensors", folder / f"{stem}.safetensors.index{dotted}.json"


def _find_shards(index: Path, key: str) -> list[Path]:
    table = read_json(index).get("weight_map")
    names = sorted(set(map(str, table.values()))) if isinstance(table, dict) else []
    if outside := [name for name in names if Path(name).name != name]:
        raise ModelError(f"{index} names {outside[0]!r}, which is not beside it; get the base from elsewhere")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing or not names:
        raise ModelError(
            f"{key} is incomplete: {index.parent} lacks {', '.join(missing) or 'all shards'}; "
            "download or copy it again"
        )
    return [index.parent / name for name in names]


def count_parameters(files: Iterable[Path]) -> int:
    """How many numbers the files hold, read from their headers."""
    return sum(prod(shape) for file in files for shape in read_header(file).shapes.values())


def digest_weights(spans: Iterable[Span | Path], *configs: Mapping[str, Any]) -> str:
    """Fingerprint of one part of a base: sha256 over its bytes and the settings that decide what they do.

    A file, or a span of one, of up to 64 MiB is read in full, of a larger one its size and 64 windows of one
    MiB, evenly spread from the first to the last byte: 3 GB take a tenth of a second instead of ten,
    and two trainings of one architecture differ in every window.
    """
    sha = hashlib.sha256()
    for config in configs:
        own = {key: value for key, value in config.items() if not key.startswith("_")}
        sha.update(json.dumps(own, sort_keys=True).encode())
    for span in spans:
        whole = Span(span, 0, span.stat().st_size) if isinstance(span, Path) else span
        sha.update(whole.size.to_bytes(8, "little"))
        for window in _windows(whole):
            sha.update(window)
    return sha.hexdigest()


@lru_cache(maxsize=4)
def kohya_hashes(path: Path) -> tuple[str, str]:
    """The hashes that web UIs know a base in one file by: the old one, of 64 KiB, and the sha256 of it all.

    A second for each 2 GB, once in a process.
    """
    with path.open("rb") as handle:
        handle.seek(0x100000)
        old = hashlib.sha256(handle.read(0x10000)).hexdigest()[:8]
        handle.seek(0)
        return old, hashlib.file_digest(handle, "sha256").hexdigest()


def _windows(span: Span) -> Iterator[bytes]:
    fits = span.size <= WINDOWS * WINDOW_BYTES
    last = 0 if fits else span.size - WINDOW_BYTES
    with span.path.open("rb") as handle:
        for start in [0] if fits else [last * number // (WINDOWS - 1) for number in range(WINDOWS)]:
            handle.seek(span.start + start)
            yield handle.read(span.size if fits else WINDOW_BYTES)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        ModelError: If the file is missing, unreadable or something else.
    """
    try:
        value = reading.read_json(path, MAX_JSON_BYTES)
    except FileNotFoundError:
        raise ModelError(f"{path} is missing; the base is incomplete, download or copy it again") from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}); download or copy it again") from None
    except UnfitFileError as error:
        raise ModelError(f"{path} {error}; download or copy it again", key=error.key) from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} is not a JSON object; download or copy it again")
    return value
