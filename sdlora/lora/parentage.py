"""Who stands on whom among the nodes of a tree, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from sdlora.errors import AdapterError
from sdlora.lora.lineage import Ancestor, check_digest
from sdlora.lora.nodes import Node


@dataclass(frozen=True)
class Parentage:
    """The parents of nodes.

    Args:
        parents: Node to parent, whether or not it is the right one.
        refused: Node to the line that says why it must not be used.
        problems: What is odd but does no harm, one line each.
    """

    parents: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def find_parentage(nodes: Mapping[str, Node], place: str) -> Parentage:
    """Finds each node's parent by its tensors, else by its name.

    Args:
        nodes: By name.
        place: What to call where they are.
    """
    found = Parentage()
    by_digest: dict[str, str] = {}
    for name, node in nodes.items():
        first = by_digest.setdefault(node.digest, name)
        if first != name:
            found.problems.append(f"{name} holds the same tensors as {first}; keep one of them")
    for name, node in nodes.items():
        if not node.lineage:
            continue
        expected = node.lineage[-1]
        parent = by_digest.get(expected.digest) or _namesake(expected, nodes)
        if parent is None:
            found.refused[name] = (
                f"{name} was trained on {expected}, which is not in {place}; put that file there"
            )
            continue
        found.parents[name] = parent
        try:
            check_digest(name, expected, parent, nodes[parent].digest)
        except AdapterError as error:
            found.refused[name] = str(error)
    for name in nodes:
        _cut_circle(name, found)
    for name in nodes:
        _check_lineage(name, nodes, found)
    return found


def path_of(name: str, parents: Mapping[str, str]) -> list[str]:
    """A node and all above it, the root first."""
    path = [name]
    while (above := parents.get(path[0])) is not None:
        path.insert(0, above)
    return path


def _namesake(ancestor: Ancestor, nodes: Mapping[str, Node]) -> str | None:
    """A node that is called as the ancestor was."""
    return next((name for name in nodes if ancestor.name in (name, name.rpartition("/")[2])), None)


def _cut_circle(name: str, found: Parentage) -> None:
    """Refuses a node that is among its own ancestors, which only edited metadata makes."""
    above = [name]
    while (step := found.parents.get(above[-1])) is not None and step not in above:
        above.append(step)
    if step == name:
        found.refused[name] = f"{name} is among its own ancestors ({' < '.join([*above, name])})"
        found.parents.pop(name)


def _check_lineage(name: str, nodes: Mapping[str, Node], found: Parentage) -> None:
    """Whether the ancestors are those that were there at the training, all the way up."""
    *above, _ = path = path_of(name, found.parents)
    if any(step in found.refused for step in path):
        return
    lineage = nodes[name].lineage
    if [ancestor.digest for ancestor in lineage] != [nodes[step].digest for step in above]:
        expected = " > ".join(map(str, lineage))
        found.refused[name] = f"{name} was trained on {expected}, but stands on {' > '.join(above)} here"
