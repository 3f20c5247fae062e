"""The nodes of a tree: LoRA files in a folder, and what they say of themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sdlora.errors import AdapterError, RunError, shorten
from sdlora.formats.files import inspect_adapter
from sdlora.runs import RunFolder
from sdlora.tree.lineage import (
    ENDING,
    KOHYA_ENDING,
    Ancestor,
    describe_mismatch,
    digest_file,
    read_lineage,
    recorded_digest,
)


@dataclass(frozen=True)
class ParentLinks:
    """The parents of nodes.

    Args:
        parents: Node to parent, or to the nearest ancestor that is there, whether or not it is the right one.
        refused: Node to the line that says why it must not be used.
        problems: What is odd but does no harm, one line each.
    """

    parents: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def link_parents(nodes: Mapping[str, Node], place: str) -> ParentLinks:
    """Finds each node's parent by its tensors, else by its name.

    Args:
        nodes: By name.
        place: What to call where they are.
    """
    found = ParentLinks()
    by_digest: dict[str, str] = {}
    for name, node in nodes.items():
        first = by_digest.setdefault(node.digest, name)
        if first != name:
            found.problems.append(f"{name} holds the same tensors as {first}; keep one of them")
    for name, node in nodes.items():
        if not node.lineage:
            continue
        there = [by_digest.get(one.digest) or _namesake(one, name, nodes) for one in node.lineage]
        parent = there[-1]
        digest = nodes[parent].digest if parent else None
        if refusal := describe_mismatch(name, node.lineage[-1], parent or f"in {place}", digest):
            found.refused[name] = refusal
        # Below a gap, the path goes on with the next ancestor that is there.
        if nearest := next(filter(None, reversed(there)), None):
            found.parents[name] = nearest
    for name in nodes:
        _break_cycle(name, found)
    for name in nodes:
        _check_lineage(name, nodes, found)
    return found


def path_to(name: str, parents: Mapping[str, str]) -> list[str]:
    """A node and all above it, the root first."""
    path = [name]
    while (above := parents.get(path[0])) is not None:
        path.insert(0, above)
    return path


def _namesake(ancestor: Ancestor, child: str, nodes: Mapping[str, Node]) -> str | None:
    """Another node that is called as the ancestor of a child was."""
    called_so = (name for name in nodes if ancestor.name in (name, name.rpartition("/")[2]))
    return next((name for name in called_so if name != child), None)


def _break_cycle(name: str, found: ParentLinks) -> None:
    """Refuses a node that is among its own ancestors, which only edited metadata makes."""
    above = [name]
    while (step := found.parents.get(above[-1])) is not None and step not in above:
        above.append(step)
    if step == name:
        found.refused[name] = f"{name} is among its own ancestors ({' < '.join([*above, name])})"
        found.parents.pop(name)


def _check_lineage(name: str, nodes: Mapping[str, Node], found: ParentLinks) -> None:
    """Whether the ancestors are those that were there at the training, all the way up."""
    *above, _ = path = path_to(name, found.parents)
    if any(step in found.refused for step in path):
        return
    lineage = nodes[name].lineage
    if [ancestor.digest for ancestor in lineage] != [nodes[step].digest for step in above]:
        expected = " > ".join(map(str, lineage))
        found.refused[name] = f"{name} was trained on {expected}, but stands on {' > '.join(above)} here"


@dataclass(frozen=True)
class Node:
    """One file of a tree.

    Args:
        name: Its path in the folder, without the ending.
        file: Where it is.
        digest: Of its tensors, as its header has it.
        lineage: The ancestors that it was trained on, the root first.
        rank: The largest of its modules.
        size_bytes: Of the file.
        notes: What the file says.
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
        """How many images it was trained on; empty if the file does not say."""
        return shorten(self.notes.get("ss_num_train_images", ""))

    @property
    def heldout_loss(self) -> float | None:
        """As measured when it was saved, on top of its ancestors."""
        try:
            return float(self.notes["sdlora.heldout_loss"])
        except (KeyError, ValueError):
            return None


def find_files(root: Path) -> dict[str, Path]:
    """Files by node name; of a run its final one, of two dialects the diffusers one."""
    files: dict[str, Path] = {}
    runs = _runs(root)
    for folder in sorted(runs):
        try:
            files[node_name(root, folder)] = RunFolder(folder).adapter
        except RunError:
            continue
    found = sorted(file for file in root.rglob(f"*{ENDING}") if not runs & set(file.parents))
    found = [file for file in found if not any(part.startswith(".") for part in file.relative_to(root).parts)]
    for file in sorted(found, key=lambda file: file.name.endswith(KOHYA_ENDING)):
        files.setdefault(node_name(root, file), file)
    return files


def find_saved_adapters(root: Path) -> dict[str, Path]:
    """What runs have saved beside the final file, by node name: earlier steps, smaller ranks."""
    found = [
        file for run in sorted(_runs(root)) for file in sorted(RunFolder(run).adapters.glob(f"*{ENDING}"))
    ]
    return {node_name(root, file): file for file in found if not file.name.endswith(KOHYA_ENDING)}


def _runs(root: Path) -> set[Path]:
    found = (RunFolder(config.parent) for config in root.rglob("config.json"))
    return {run.path for run in found if run.adapters.is_dir() or run.checkpoints.is_dir()}


def node_name(root: Path, file: Path) -> str:
    """The path in the folder, without the ending."""
    name = file.relative_to(root).as_posix()
    return name.removesuffix(KOHYA_ENDING).removesuffix(ENDING) if name != "." else root.absolute().name


def read_node(name: str, file: Path) -> Node:
    """Reads what a file says of itself.

    Raises:
        AdapterError: If it is no LoRA, or its metadata is damaged.
    """
    info = inspect_adapter(file)
    try:
        lineage = read_lineage(info.metadata)
    except AdapterError as error:
        raise AdapterError(f"{file} {error}") from None
    return Node(
        name,
        file,
        recorded_digest(file) or digest_file(file),
        lineage,
        info.rank,
        info.size_bytes,
        info.metadata,
    )
