"""Finding what an adapter stands on: its ancestors' files, wherever they lie and whatever they are called."""

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
from sdlora.formats.files import load_adapter
from sdlora.formats.keys import is_kohya_key
from sdlora.formats.write import adapter_to_diffusers
from sdlora.lora.adapter import Adapter
from sdlora.runs import RunFolder

PARENT, LINEAGE, HASH = "sdlora.parent", "sdlora.lineage", "sshs_model_hash"
ENDING, KOHYA_ENDING = ".safetensors", ".kohya.safetensors"


@dataclass(frozen=True, slots=True)
class Ancestor:
    """An adapter that another one was trained on top of."""

    name: str
    """As it was called then."""
    digest: str
    """SHA-256 of the tensors of its diffusers file."""
    strength: float = 1.0
    """As it was mounted."""

    def __str__(self) -> str:
        return f"{self.name} ({short_digest(self.digest)})"


def short_digest(digest: str) -> str:
    """The first characters of a digest, as user interfaces show it."""
    return digest[:12]


def digest_adapter(adapter: Adapter) -> str:
    """SHA-256 of the tensors of the adapter's diffusers file: the file's own `sshs_model_hash`.

    Args:
        adapter: In the dtype of its file (`load_adapter(path, dtype=None)`).
    """
    return digest_tensors(adapter_to_diffusers(adapter))


def digest_file(path: Path) -> str:
    """The digest of a LoRA file, computed; files of one adapter in several dialects have the same."""
    return digest_adapter(load_adapter(path, dtype=None))


def recorded_digest(path: Path) -> str | None:
    """The digest that a diffusers file names in its header; None if the file must be read to know it."""
    header = read_lora_header(path)
    return None if any(map(is_kohya_key, header.shapes)) else header.metadata.get(HASH)


def read_lineage(notes: Mapping[str, str]) -> tuple[Ancestor, ...]:
    """The ancestors that a file's metadata names, the root first.

    Raises:
        AdapterError: If the metadata is damaged; completes "FILE ...".
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
        raise AdapterError(f"holds {LINEAGE} that cannot be read; export the LoRA again") from None
    if chain and chain[-1].digest != parent:
        raise AdapterError(
            f"names the parent {shorten(short_digest(parent))} in {PARENT}, but {chain[-1]} in {LINEAGE}; "
            "export the LoRA again"
        )
    return chain or (Ancestor("its parent", parent),)


def lineage_to_notes(ancestors: Sequence[Ancestor]) -> dict[str, str]:
    """The metadata that names the ancestors; none for a root."""
    if not ancestors:
        return {}
    chain = json.dumps([asdict(ancestor) for ancestor in ancestors], ensure_ascii=False)
    return {PARENT: ancestors[-1].digest, LINEAGE: chain}


def child_lineage(name: str, parent: Adapter, strength: float = 1.0) -> tuple[Ancestor, ...]:
    """The ancestors of a child of an adapter, the root first.

    Args:
        name: What the parent is called.
        parent: In the dtype of its file.
        strength: As it is mounted.
    """
    return (*read_lineage(parent.notes), Ancestor(name, digest_adapter(parent), strength))


def describe_mismatch(child: str, expected: Ancestor, found: str, digest: str | None) -> str | None:
    """Why a child must not be used as things are: an error, and with `--force` a warning.

    Args:
        child: What to call it.
        expected: As the child's file names it.
        found: What to call the one that is there; where it was looked for, if there is none.
        digest: Of that one; None if there is none.

    Returns:
        What was expected and what was found; None if that is the same.
    """
    if digest == expected.digest:
        return None
    trained = f"{child} was trained on {expected}"
    if digest is None:
        return f"{trained}, which is not {found}; put that file there (--force goes without it)"
    return f"{trained}, but {found} is {short_digest(digest)} now; put the old file back (--force takes this one)"


Stack: TypeAlias = tuple[tuple[Adapter, float], ...]
"""Adapters with their strengths, in the order they are mounted."""

_LEVELS = 4


@dataclass(frozen=True)
class PathEntry:
    """One adapter of a path, found and loaded.

    Args:
        ancestor: Its name, its digest as it is, and its strength.
        file: Where it is.
        adapter: In fp32.
    """

    ancestor: Ancestor
    file: Path
    adapter: Adapter


def path_to_stack(path: Sequence[PathEntry]) -> Stack:
    """What `mount` takes."""
    return tuple((step.adapter, step.ancestor.strength) for step in path)


def load_path(
    source: str | Path, *, force: bool = False, warn: Callable[[str], None] | None = None
) -> list[PathEntry]:
    """An adapter and all it stands on, the root first: the path that a child of it is trained on.

    Args:
        source: A LoRA file, a run folder, or a file without its ending, as a tree calls it.
        force: As in `find_ancestors`, and so is `warn`.

    Raises:
        AdapterError: If there is no such file, or an ancestor is missing or changed.
    """
    file = find_source(source)
    own = _load_entry(file, adapter_name(file))
    return [*find_ancestors(file, own.adapter, force=force, warn=warn), own]


def _load_entry(file: Path, name: str, strength: float = 1.0) -> PathEntry:
    loaded = load_adapter(file, dtype=None)
    ancestor = Ancestor(name, digest_adapter(loaded), strength)
    return PathEntry(ancestor, file, loaded.to(dtype=torch.float32))


def find_source(source: str | Path) -> Path:
    """The file that a file, a run or a node stands for.

    Raises:
        AdapterError: If there is none.
    """
    path = Path(source)
    run = RunFolder(path)
    if run.config_file.is_file():
        return run.adapter
    candidates = [path, *(Path(f"{path}{ending}") for ending in (ENDING, KOHYA_ENDING))]
    found = next((file for file in candidates if file.is_file()), None)
    if found is None:
        raise AdapterError(f"{source} is no LoRA file, no run and no node; give one of them")
    return found


def adapter_name(file: Path) -> str:
    """What to call an adapter: its run's name (`ink`, or `ink/rank-4`), or the file's without the ending."""
    run, own = _run_of(file), file.name.removesuffix(KOHYA_ENDING).removesuffix(ENDING)
    if run is None:
        return own
    return run.name if own == "final" else f"{run.name}/{own}"


def find_ancestors(
    file: Path, adapter: Adapter, *, force: bool = False, warn: Callable[[str], None] | None = None
) -> list[PathEntry]:
    """Finds and loads the adapters that another one was trained on top of, the root first.

    They are looked for where the run of the file says, beside the file, in the folders beside it, and
    likewise up to three folders above; each next one also around the one before.

    Args:
        file: Where the adapter is from.
        adapter: As loaded.
        force: Takes a file of the right name that holds other tensors, and goes without one that is missing.
        warn: Told of each that is taken, or gone without, by force.

    Raises:
        AdapterError: If one is not there, or is not what it was; says what was expected and found.
    """
    path: list[PathEntry] = []
    child, places = file, list(_places(file))
    for ancestor in reversed(read_lineage(adapter.notes)):
        place = _find(ancestor, places)
        step = _load_entry(place, ancestor.name, ancestor.strength) if place else None
        found = str(place or "beside it, nor in the folders above")
        refusal = describe_mismatch(
            adapter_name(child), ancestor, found, step.ancestor.digest if step else None
        )
        if refusal and not force:
            raise AdapterError(refusal)
        if refusal and warn:
            warn(refusal)
        if step is not None:
            path.insert(0, step)
            child, places = step.file, list(dict.fromkeys([*_places(step.file), *places]))
    return path


def _find(ancestor: Ancestor, places: Sequence[Path]) -> Path | None:
    """The file with the ancestor's tensors, else one of its name."""
    unknown: list[Path] = []
    for place in places:
        with suppress(AdapterError):
            noted = recorded_digest(place)
            if noted == ancestor.digest:
                return place
            unknown += [place] if noted is None else []
    # Others must be read whole, which takes time where many lie about.
    for place in unknown:
        with suppress(AdapterError):
            if digest_file(place) == ancestor.digest:
                return place
    return next((place for place in places if place.is_file() and adapter_name(place) == ancestor.name), None)


def _run_of(file: Path) -> RunFolder | None:
    """The run that a file is an adapter of."""
    run = RunFolder(file.absolute().parent.parent)
    return run if file.absolute().parent == run.adapters and run.config_file.is_file() else None


def _places(file: Path) -> Iterator[Path]:
    """Files that may be the parent of one, the likeliest first."""
    if run := _run_of(file):
        with suppress(RunError, ConfigError):
            if parent := run.read_config().lora.parent:
                yield Path(parent)
    folder = file.absolute().parent
    for place in [folder, *folder.parents[: _LEVELS - 1]]:
        for pattern in (
            f"*{ENDING}",
            f"*/*{ENDING}",
            f"*/adapters/final{ENDING}",
            f"*/adapters/*-*[0-9]{ENDING}",
        ):
            yield from (other for other in sorted(place.glob(pattern)) if other != file.absolute())
