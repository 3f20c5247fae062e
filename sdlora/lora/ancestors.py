"""Finding what an adapter stands on: its ancestors' files, wherever they lie and whatever they are called."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch

from sdlora.errors import AdapterError, ConfigError, RunError
from sdlora.lora.adapter import Adapter
from sdlora.lora.files import load_adapter
from sdlora.lora.lineage import (
    ENDING,
    KOHYA_ENDING,
    Ancestor,
    digest_adapter,
    digest_file,
    explain_refusal,
    noted_digest,
    read_lineage,
)
from sdlora.runs import RunFolder

Stack: TypeAlias = tuple[tuple[Adapter, float], ...]
"""Adapters with their strengths, in the order they are mounted."""

_LEVELS = 4


@dataclass(frozen=True)
class Step:
    """One adapter of a path, found and loaded.

    Args:
        ancestor: Its name, its digest as it is, and its strength.
        file: Where it is.
        adapter: In fp32.
    """

    ancestor: Ancestor
    file: Path
    adapter: Adapter


def stack_of(path: Sequence[Step]) -> Stack:
    """What `mount` takes."""
    return tuple((step.adapter, step.ancestor.strength) for step in path)


def load_path(
    source: str | Path, *, force: bool = False, warn: Callable[[str], None] | None = None
) -> list[Step]:
    """An adapter and all it stands on, the root first: the path that a child of it is trained on.

    Args:
        source: A LoRA file, a run folder, or a file without its ending, as a tree calls it.
        force: As in `find_ancestors`, and so is `warn`.

    Raises:
        AdapterError: If there is no such file, or an ancestor is missing or changed.
    """
    file = find_source(source)
    own = _load_step(file, name_of(file))
    return [*find_ancestors(file, own.adapter, force=force, warn=warn), own]


def _load_step(file: Path, name: str, strength: float = 1.0) -> Step:
    loaded = load_adapter(file, dtype=None)
    ancestor = Ancestor(name, digest_adapter(loaded), strength)
    return Step(ancestor, file, loaded.to(dtype=torch.float32))


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


def name_of(file: Path) -> str:
    """What to call an adapter: its run's name (`ink`, or `ink/rank-4`), or the file's without the ending."""
    run, own = _run_of(file), file.name.removesuffix(KOHYA_ENDING).removesuffix(ENDING)
    if run is None:
        return own
    return run.name if own == "final" else f"{run.name}/{own}"


def find_ancestors(
    file: Path, adapter: Adapter, *, force: bool = False, warn: Callable[[str], None] | None = None
) -> list[Step]:
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
    path: list[Step] = []
    child, places = file, list(_places(file))
    for ancestor in reversed(read_lineage(adapter.notes)):
        place = _find(ancestor, places)
        step = _load_step(place, ancestor.name, ancestor.strength) if place else None
        found = str(place or "beside it, nor in the folders above")
        refusal = explain_refusal(name_of(child), ancestor, found, step.ancestor.digest if step else None)
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
            noted = noted_digest(place)
            if noted == ancestor.digest:
                return place
            unknown += [place] if noted is None else []
    # Others must be read whole, which takes time where many lie about.
    for place in unknown:
        with suppress(AdapterError):
            if digest_file(place) == ancestor.digest:
                return place
    return next((place for place in places if place.is_file() and name_of(place) == ancestor.name), None)


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
