"""What a grid compares: runs, LoRA files, adapters in memory, tree nodes, and sums of several."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from sdlora.formats.archives import open_archive
from sdlora.formats.files import load_adapter, resolve_adapter, split_sum
from sdlora.lora.adapter import Adapter
from sdlora.runs import RunFolder
from sdlora.sampling.generate import Column
from sdlora.sampling.images import slug
from sdlora.tree.lineage import PathEntry, Stack, adapter_name, check_additive, find_ancestors, path_to_stack

Source: TypeAlias = str | os.PathLike[str] | Adapter
"""A run, a LoRA file, a zip archive of either, a tree node, an adapter, or a sum such as `a:0.6+b:0.4`."""
Step: TypeAlias = int | str | None
"""A saved step of a run, "final", or None for the final one or the newest."""
TRIGGER = "modelspec.trigger_phrase"


@dataclass(frozen=True, eq=False)
class Part:
    """An adapter with its file, its factor in a sum, its run if it was found in one, and its ancestors."""

    file: Path
    adapter: Adapter
    factor: float = 1.0
    run: RunFolder | None = None
    ancestors: Sequence[PathEntry] = ()

    @property
    def trigger(self) -> str | None:
        own = self.run.read_config().data.trigger if self.run else None
        return own or self.adapter.notes.get(TRIGGER)

    @property
    def name(self) -> str:
        return self.run.name if self.run else adapter_name(self.file)


@dataclass(frozen=True, eq=False)
class Subject:
    """One or several adapters that are shown as one, at the same strengths.

    Args:
        parts: The adapters.
        name: For headings.
        step: The saved step that was asked for.
        is_sum: Whether factors were given, so that the strength is that of the whole.
    """

    parts: Sequence[Part]
    name: str
    step: Step = None
    is_sum: bool = False

    @property
    def ancestors(self) -> Stack:
        """Those of all parts, each once."""
        entries = {entry.ancestor.digest: entry for part in self.parts for entry in part.ancestors}
        return path_to_stack(list(entries.values()))

    @property
    def run(self) -> RunFolder | None:
        """The run of the adapter; None for a file, or a sum."""
        return None if self.is_sum else self.parts[0].run

    def is_shown_in(self, column: Column) -> bool:
        return bool(column.stack) and column.stack[-1][0] is self.parts[-1].adapter

    def column(self, strength: float, name: str) -> Column:
        own = tuple((part.adapter, part.factor * strength) for part in self.parts)
        return Column((*self.ancestors, *own), strength, name, self.parts[0].trigger)


def find_subjects(
    sources: Source | Sequence[Source],
    steps: Sequence[Step],
    *,
    force: bool = False,
    warn: Callable[[str], None] | None = None,
) -> list[Subject]:
    """Loads all adapters with their ancestors, one subject for each source, and for each step of a run.

    Steps are those of runs; what is not a run is taken as it is, unless nothing is a run.

    Raises:
        SdloraError: If something does not exist, or cannot be read or added.
    """
    given = [sources] if isinstance(sources, str | os.PathLike | Adapter) else sources
    sums = [
        [(one, 1.0)]
        if isinstance(one, Adapter)
        else [(open_archive(source), factor) for source, factor in split_sum(one)]
        for one in given
    ]
    has_run = any(_is_run(source) for parts in sums for source, _ in parts)
    subjects = []
    for parts in sums:
        own = steps if not has_run or any(_is_run(source) for source, _ in parts) else [None]
        for step in own:
            found = [_find_part(source, factor, step, has_run) for source, factor in parts]
            found = [
                replace(part, ancestors=find_ancestors(part.file, part.adapter, force=force, warn=warn))
                if part.adapter.parent
                else part
                for part in found
            ]
            if len(found) > 1:
                for part in found:
                    check_additive(part.file, part.adapter)
            is_sum = len(parts) > 1 or parts[0][1] != 1.0
            name = " + ".join(f"{p.name} {p.factor:g}" for p in found) if is_sum else found[0].name
            subjects.append(Subject(found, name, step, is_sum))
    return _with_names(subjects, given)


def _is_run(source: Source) -> bool:
    return not isinstance(source, Adapter) and RunFolder(source).exists


def _find_part(source: Source, factor: float, step: Step, has_run: bool) -> Part:
    if isinstance(source, Adapter):
        name = source.notes.get("modelspec.title") or source.notes.get("ss_output_name") or "adapter"
        return Part(Path(name), source, factor)
    found = resolve_adapter(source, step if _is_run(source) or not has_run else None)
    return Part(found.file, load_adapter(found.file), factor, found.run)


def _with_names(subjects: Sequence[Subject], given: Iterable[Source]) -> list[Subject]:
    """Names that tell subjects apart: with the step where steps are compared, with a number if need be."""
    has_steps = len({subject.step for subject in subjects}) > 1
    has_names = len({subject.name for subject in subjects}) > 1
    named: list[Subject] = []
    for subject in subjects:
        step = name_step(subject.step) if has_steps and subject.step is not None else ""
        name = ", ".join(filter(None, [subject.name, step])) if has_names or not step else step
        taken, number = {one.name for one in named}, 2
        unique = name
        while unique in taken:
            unique, number = f"{name} ({number})", number + 1
        named.append(replace(subject, name=unique))
    return named


def name_step(step: Step) -> str:
    return f"step {step}" if isinstance(step, int) else str(step)


def make_columns_of(subjects: Sequence[Subject], strengths: Sequence[float], own: bool) -> list[Column]:
    """The base, parents, and each subject at each strength other than 0; each once.

    Args:
        subjects: From `find_subjects`.
        strengths: Strengths of each.
        own: Whether the strengths were not asked for: a sum is then shown as it is given.
    """
    columns, parents = [Column()], set()
    for subject in subjects:
        last = subject.parts[0].ancestors[-1:]
        if len(subject.parts) == 1 and last and last[0].ancestor.digest not in parents:
            parents.add(last[0].ancestor.digest)
            columns.append(Column(subject.ancestors, 1.0, last[0].ancestor.name))
        has_name = len(subjects) > 1 or subject.is_sum or bool(last)
        shown = [1.0] if own and subject.is_sum else [float(strength) for strength in strengths]
        name = subject.name if has_name else ""
        columns += [subject.column(strength, name) for strength in dict.fromkeys(shown) if strength]
    return columns


def describe_subjects(subjects: Sequence[Subject]) -> tuple[str, str, str | None]:
    """The title of their grid, the name of its folder, and that of the adapter if it is one, at any step."""
    first, names = subjects[0], [subject.name for subject in subjects]
    steps = [name_step(subject.step) for subject in subjects if subject.step is not None]
    files = {(part.run.path if part.run else part.file) for subject in subjects for part in subject.parts}
    if len(files) > 1 or first.is_sum:
        return ", ".join(names), slug("-".join(names)), None
    part = first.parts[0]
    name = part.run.name if part.run else part.file.stem
    return ", ".join([name if part.run else part.file.name, *steps]), name, name
