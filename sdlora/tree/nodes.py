"""The nodes of a tree: LoRA files in a folder, linked to the parents that their metadata names."""

from __future__ import annotations

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
    """One file of a tree.

    Args:
        name: Its path in the folder, without the ending.
        digest: Of its tensors, as recorded in its header.
        lineage: The ancestors that it was trained on, the root first.
        rank: The largest of its modules.
        notes: The file's metadata.
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
        return shorten(self.notes.get("ss_num_train_images", ""))

    @property
    def heldout_loss(self) -> float | None:
        """The loss when it was saved, on top of its ancestors."""
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
    """Files by node name: a run's final adapter, and of two dialects the diffusers file."""
    files: dict[str, Path] = {}
    runs = _runs(root)
    for folder in sorted(runs):
        with suppress(RunError):
            files[node_name(root, folder)] = RunFolder(folder).adapter
    found = sorted(file for file in root.rglob(f"*{ENDING}") if not runs & set(file.parents))
    found = [file for file in found if not any(part.startswith(".") for part in file.relative_to(root).parts)]
    for file in sorted(found, key=lambda file: file.name.endswith(KOHYA_ENDING)):
        files.setdefault(node_name(root, file), file)
    return files


def find_saved_adapters(root: Path) -> dict[str, Path]:
    """What runs have saved beside their final adapters, by node name: earlier steps, smaller ranks."""
    found = (
        file for run in sorted(_runs(root)) for file in sorted(RunFolder(run).adapters.glob(f"*{ENDING}"))
    )
    return {node_name(root, file): file for file in found if not file.name.endswith(KOHYA_ENDING)}


def _runs(root: Path) -> set[Path]:
    found = (RunFolder(config.parent) for config in root.rglob("config.json"))
    return {run.path for run in found if run.adapters.is_dir() or run.checkpoints.is_dir()}


def node_name(root: Path, file: Path) -> str:
    """The path in the folder, without the ending."""
    name = file.relative_to(root).as_posix()
    return name.removesuffix(KOHYA_ENDING).removesuffix(ENDING) if name != "." else root.absolute().name


@dataclass(frozen=True)
class ParentLinks:
    """The attributes of a tree; `problems` are odd but harmless, one line each."""

    parents: dict[str, str] = field(default_factory=dict)
    errors: dict[str, AdapterError] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def link_parents(nodes: Mapping[str, Node], place: str) -> ParentLinks:
    """Finds each node's parent by its tensors, else by its name; `place` is their folder, for messages."""
    links = ParentLinks()
    by_digest: dict[str, str] = {}
    for name, node in nodes.items():
        if (first := by_digest.setdefault(node.digest, name)) != name:
            links.problems.append(f"{name} holds the same tensors as {first}; keep one of them")
    for name, node in nodes.items():
        if not node.lineage:
            continue
        found = [by_digest.get(one.digest) or _namesake(one, name, nodes) for one in node.lineage]
        parent = found[-1]
        digest = nodes[parent].digest if parent else None
        if error := parent_error(name, node.lineage[-1], parent or f"in {place}", digest):
            links.errors[name] = error
        # The path skips ancestors that are missing.
        if nearest := next(filter(None, reversed(found)), None):
            links.parents[name] = nearest
    for name in nodes:
        _break_cycle(name, links)
    for name in nodes:
        if error := _lineage_error(name, nodes, links):
            links.errors[name] = error
    return links


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


def _break_cycle(name: str, links: ParentLinks) -> None:
    """Refuses a node that is its own ancestor, which only edited metadata makes possible."""
    above = [name]
    while (parent := links.parents.get(above[-1])) is not None and parent not in above:
        above.append(parent)
    if parent == name:
        path = " < ".join([*above, name])
        links.errors[name] = AdapterError(f"{name} is its own ancestor ({path})", key="tree.cycle")
        links.parents.pop(name)


def _lineage_error(name: str, nodes: Mapping[str, Node], links: ParentLinks) -> AdapterError | None:
    """Refuses a node whose parent is right but has other ancestors than in the node's training."""
    *above, _ = path = path_to(name, links.parents)
    if any(step in links.errors for step in path):
        return None
    lineage = nodes[name].lineage
    if [ancestor.digest for ancestor in lineage] == [nodes[step].digest for step in above]:
        return None
    expected, found = " > ".join(map(str, lineage)), " > ".join(above)
    return AdapterError(
        f"{name} was trained on {expected}, but its ancestors here are {found}; --force takes these",
        key="tree.lineage-changed",
    )
