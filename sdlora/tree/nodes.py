"""The nodes of a tree: LoRA files in a folder, linked to the parents that their metadata names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from sdlora.errors import AdapterError, RunError, shorten
from sdlora.formats.files import ENDING, KOHYA_ENDING, inspect_adapter
from sdlora.runs import RunFolder
from sdlora.tree.lineage import Ancestor, digest_file, parent_error, read_lineage, recorded_digest


@dataclass(frozen=True)
class Node:
    """A file of a tree.

    Args:
        name: Path of the file in the folder, without the ending.
        digest: SHA-256 of the tensors, as recorded in the header.
        lineage: The ancestors that the adapter was trained on, the root first.
        rank: The largest rank of a module.
        notes: The metadata of the file.
    """

    name: str
    file: Path
    digest: str
    lineage: tuple[Ancestor, ...]
    rank: int
    size_bytes: int
    notes: Mapping[str, str] = field(repr=False)

    @property
    def images(self) -> str:
        """The number of images; that with repeats if the file does not list its folders."""
        counts = re.findall(r'"img_count": ?([0-9]{1,9})\b', self.notes.get("ss_dataset_dirs", ""))
        return str(sum(map(int, counts))) if counts else shorten(self.notes.get("ss_num_train_images", ""))

    @property
    def heldout_loss(self) -> float | None:
        """The loss at the time of saving, on top of the ancestors."""
        try:
            return float(self.notes["sdlora.heldout_loss"])
        except (KeyError, ValueError):
            return None


def read_node(name: str, file: Path) -> Node:
    """Reads a file's header; raises an AdapterError if it is not a LoRA, or its metadata is damaged."""
    info = inspect_adapter(file)
    try:
        lineage = read_lineage(info.metadata)
    except AdapterError as error:
        raise AdapterError(f"{file} {error}", key=error.keys[0]) from None
    digest = recorded_digest(file) or digest_file(file)
    return Node(name, file, digest, lineage, info.rank, info.size_bytes, info.metadata)


def find_files(root: Path) -> dict[str, Path]:
    """Files by node name: the final adapter of a run, and the diffusers file where there are two dialects."""
    files: dict[str, Path] = {}
    runs = _runs(root)
    for folder in sorted(runs):
        with suppress(RunError):
            files[_node_name(root, folder)] = RunFolder(folder).adapter
    found = [
        file
        for file in sorted(root.rglob(f"*{ENDING}"))
        if not runs & set(file.parents)
        and not any(part.startswith(".") for part in file.relative_to(root).parts)
    ]
    for file in sorted(found, key=lambda file: file.name.endswith(KOHYA_ENDING)):
        files.setdefault(_node_name(root, file), file)
    return files


def find_saved_adapters(root: Path) -> dict[str, Path]:
    """Other adapters of runs by node name: earlier steps, smaller ranks."""
    return {
        _node_name(root, file): file
        for run in sorted(_runs(root))
        for file in sorted(RunFolder(run).adapters.glob(f"*{ENDING}"))
        if not file.name.endswith(KOHYA_ENDING)
    }


def _runs(root: Path) -> set[Path]:
    found = (RunFolder(config.parent) for config in root.rglob("config.json"))
    return {run.path for run in found if run.adapters.is_dir() or run.checkpoints.is_dir()}


def _node_name(root: Path, file: Path) -> str:
    name = file.relative_to(root).as_posix()
    return name.removesuffix(KOHYA_ENDING).removesuffix(ENDING) if name != "." else root.absolute().name


def link_parents(
    nodes: Mapping[str, Node], place: str
) -> tuple[dict[str, str], dict[str, AdapterError], list[str]]:
    """Finds the parent of each node by its tensors, else by its name; `place` is their folder, for messages.

    Returns:
        Node to parent, or to the nearest ancestor that was found; node to the reason why it must not be used;
        and a line for each node that is a copy of another.
    """
    parents: dict[str, str] = {}
    errors: dict[str, AdapterError] = {}
    problems: list[str] = []
    by_digest: dict[str, str] = {}
    for name, node in nodes.items():
        if (first := by_digest.setdefault(node.digest, name)) != name:
            problems.append(f"{name} has the same tensors as {first}; keep one of them")
    for name, node in nodes.items():
        if not node.lineage:
            continue
        found = [by_digest.get(one.digest) or _namesake(one, name, nodes) for one in node.lineage]
        parent = found[-1]
        digest = nodes[parent].digest if parent else None
        if error := parent_error(name, node.lineage[-1], parent or f"in {place}", digest):
            errors[name] = error
        if nearest := next(filter(None, reversed(found)), None):
            parents[name] = nearest
    for name in nodes:
        if cycle := _cycle(name, parents):
            path = " < ".join(cycle)
            errors[name] = AdapterError(f"{name} is its own ancestor ({path})", key="tree.cycle")
            parents.pop(name)
    for name, node in nodes.items():
        *above, _ = path_names = path_to(name, parents)
        digests = [nodes[step].digest for step in above]
        if errors.keys() & set(path_names) or digests == [one.digest for one in node.lineage]:
            continue
        expected, present = " > ".join(map(str, node.lineage)), " > ".join(above)
        errors[name] = AdapterError(
            f"{name} was trained on {expected}, but its ancestors here are {present}; use --force to take "
            "these",
            key="tree.lineage-changed",
        )
    return parents, errors, problems


def path_to(name: str, parents: Mapping[str, str]) -> list[str]:
    """A node and its ancestors, the root first."""
    path = [name]
    while (above := parents.get(path[0])) is not None:
        path.insert(0, above)
    return path


def _namesake(ancestor: Ancestor, child: str, nodes: Mapping[str, Node]) -> str | None:
    """Another node with the name that the ancestor of a child had."""
    same = (name for name in nodes if ancestor.name in (name, name.rpartition("/")[2]))
    return next((name for name in same if name != child), None)


def _cycle(name: str, parents: Mapping[str, str]) -> list[str]:
    """The way from a node to itself, which only edited metadata makes possible; else empty."""
    above = [name]
    while (parent := parents.get(above[-1])) is not None and parent not in above:
        above.append(parent)
    return [*above, name] if parent == name else []
