"""The ancestors of an adapter: names and digests in its metadata, and their files on the disk."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeAlias

import torch

from sdlora.errors import AdapterError, ConfigError, RunError, shorten
from sdlora.formats.container import digest_tensors, read_lora_header
from sdlora.formats.files import ENDING, KOHYA_ENDING, load_adapter, resolve_adapter
from sdlora.formats.keys import is_kohya_key
from sdlora.formats.write import adapter_to_diffusers
from sdlora.lora.adapter import Adapter, low_rank_modules
from sdlora.runs import RunFolder

PARENT, LINEAGE, HASH = "sdlora.parent", "sdlora.lineage", "sshs_model_hash"


@dataclass(frozen=True, slots=True)
class Ancestor:
    """An adapter under another one, with its name and strength in the training of that.

    `digest` is the SHA-256 of the tensors in its diffusers file.
    """

    name: str
    digest: str
    strength: float = 1.0

    def __str__(self) -> str:
        return f"{self.name} ({short_digest(self.digest)})"


def short_digest(digest: str) -> str:
    return digest[:12]


def digest_adapter(adapter: Adapter) -> str:
    """SHA-256 of the tensors in the adapter's diffusers file, which is the `sshs_model_hash` of that file.

    The adapter must be in the dtype of its file (`load_adapter(path, dtype=None)`).
    """
    return digest_tensors(adapter_to_diffusers(adapter))


def digest_file(path: Path) -> str:
    """Computes the digest of a LoRA file; it is the same for every dialect of an adapter."""
    return digest_adapter(load_adapter(path, dtype=None))


def recorded_digest(path: Path) -> str | None:
    """The digest in the header of a diffusers file; None if it must be computed from the tensors."""
    header = read_lora_header(path)
    return None if any(map(is_kohya_key, header.shapes)) else header.metadata.get(HASH)


def read_lineage(notes: Mapping[str, str]) -> tuple[Ancestor, ...]:
    """The ancestors in a file's metadata, the root first.

    Raises an AdapterError if it is damaged; the message completes "FILE ...".
    """
    parent = notes.get(PARENT)
    if not parent:
        return ()
    try:
        chain = tuple(
            Ancestor(shorten(str(item["name"])), shorten(str(item["digest"])), float(item["strength"]))
            for item in json.loads(notes.get(LINEAGE) or "[]")
        )
        if not all(math.isfinite(ancestor.strength) for ancestor in chain):
            raise ValueError
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
        message = f"has unreadable metadata in {LINEAGE}; export the LoRA again"
        raise AdapterError(message, key="tree.bad-lineage") from None
    if chain and chain[-1].digest != parent:
        raise AdapterError(
            f"names the parent {shorten(short_digest(parent))} in {PARENT}, but {chain[-1]} in {LINEAGE}; "
            "export the LoRA again",
            key="tree.contradicting-parents",
        )
    return chain or (Ancestor("its parent", parent),)


def lineage_to_notes(ancestors: Sequence[Ancestor]) -> dict[str, str]:
    """The metadata for a file with these ancestors; empty for a root."""
    if not ancestors:
        return {}
    chain = json.dumps([asdict(ancestor) for ancestor in ancestors], ensure_ascii=False)
    return {PARENT: ancestors[-1].digest, LINEAGE: chain}


def parent_error(child: str, expected: Ancestor, found: str, digest: str | None) -> AdapterError | None:
    """Compares a parent with that in the metadata of its child.

    `found` is the name of the parent that was found, `digest` its digest; or the place that was searched, and
    None.
    """
    if digest == expected.digest:
        return None
    trained = f"{child} was trained on {expected}"
    if digest is None:
        return AdapterError(
            f"{trained}, which is not {found}; restore that file, or use --force to continue without it",
            key="tree.parent-missing",
        )
    return AdapterError(
        f"{trained}, but {found} is {short_digest(digest)} now; restore the old file, or use --force to take "
        "this one",
        key="tree.parent-changed",
    )


Stack: TypeAlias = tuple[tuple[Adapter, float], ...]
"""Adapters with their strengths, in the order they are mounted."""

_LEVELS = 4


@dataclass(frozen=True)
class PathEntry:
    """An adapter of a path, loaded in fp32; `ancestor` has its present digest."""

    ancestor: Ancestor
    file: Path
    adapter: Adapter


def path_to_stack(path: Sequence[PathEntry]) -> Stack:
    return tuple((entry.adapter, entry.ancestor.strength) for entry in path)


def load_path(
    source: str | Path, *, force: bool = False, warn: Callable[[str], None] | None = None
) -> list[PathEntry]:
    """Loads an adapter (a file, run or node) with its ancestors, the root first: the path under its child."""
    file = resolve_adapter(source).file
    own = _load_entry(file, adapter_name(file))
    return [*find_ancestors(file, own.adapter, force=force, warn=warn), own]


def _load_entry(file: Path, name: str, strength: float = 1.0) -> PathEntry:
    loaded = load_adapter(file, dtype=None)
    ancestor = Ancestor(name, digest_adapter(loaded), strength)
    return PathEntry(ancestor, file, loaded.to(dtype=torch.float32))


def adapter_name(file: Path) -> str:
    """The name of the adapter's run (`ink`, or `ink/rank-4`), or of the file without the ending."""
    run, own = _run_of(file), file.name.removesuffix(KOHYA_ENDING).removesuffix(ENDING)
    return own if run is None else run.name if own == "final" else f"{run.name}/{own}"


def find_ancestors(
    file: Path, adapter: Adapter, *, force: bool = False, warn: Callable[[str], None] | None = None
) -> list[PathEntry]:
    """Finds and loads the ancestors of an adapter, the root first.

    The search starts at the path in the settings of the file's run, and continues beside the file and around
    the three folders above it; that for further ancestors also around the ones already found.

    Args:
        file: The file of the adapter.
        adapter: Its content.
        force: Accepts a file of the right name with other tensors, and continues without a missing one.
        warn: Called with a line for each of these.

    Raises:
        AdapterError: If an ancestor is missing or changed, or a kind of the path cannot be added to others.
    """
    lineage = read_lineage(adapter.notes)
    if not lineage:
        return []
    check_additive(file, adapter)
    path: list[PathEntry] = []
    child, places = file, list(_places(file))
    for ancestor in reversed(lineage):
        place = _find(ancestor, places)
        entry = _load_entry(place, ancestor.name, ancestor.strength) if place else None
        found = str(place or "beside it, nor in the folders above")
        error = parent_error(adapter_name(child), ancestor, found, entry.ancestor.digest if entry else None)
        if error and not force:
            raise error
        if error and warn:
            warn(str(error))
        if entry is not None:
            check_additive(entry.file, entry.adapter)
            path.insert(0, entry)
            child, places = entry.file, list(dict.fromkeys([*_places(entry.file), *places]))
    return path


def check_additive(file: Path, adapter: Adapter) -> None:
    """Raises an AdapterError for kinds that cannot be added to others, such as DoRA."""
    low_rank_modules(adapter, f"{file}: a tree of adapters")


def _find(ancestor: Ancestor, places: Sequence[Path]) -> Path | None:
    """The file with the ancestor's tensors, else one of its name."""
    unknown: list[Path] = []
    for place in places:
        with suppress(AdapterError):
            recorded = recorded_digest(place)
            if recorded == ancestor.digest:
                return place
            unknown += [place] if recorded is None else []
    # These must be read in full, which takes time where there are many.
    for place in unknown:
        with suppress(AdapterError):
            if digest_file(place) == ancestor.digest:
                return place
    return next((place for place in places if place.is_file() and adapter_name(place) == ancestor.name), None)


def _run_of(file: Path) -> RunFolder | None:
    run = RunFolder(file.absolute().parent.parent)
    return run if file.absolute().parent == run.adapters and run.exists else None


def _places(file: Path) -> Iterator[Path]:
    """Files that may be the parent of a file, the most likely first."""
    if run := _run_of(file):
        with suppress(RunError, ConfigError):
            if parent := run.read_config().lora.parent:
                yield Path(parent)
    folder = file.absolute().parent
    for place in [folder, *folder.parents[: _LEVELS - 1]]:
        for pattern in ("*", "*/*", "*/adapters/final", "*/adapters/*-*[0-9]"):
            yield from (other for other in sorted(place.glob(pattern + ENDING)) if other != file.absolute())
