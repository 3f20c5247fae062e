"""Who stands on whom among the nodes of a tree, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from sdlora.lora.lineage import Ancestor, explain_refusal
from sdlora.lora.nodes import Node


@dataclass(frozen=True)
class Parentage:
    """The parents of nodes.

    Args:
        parents: Node to parent, or to the nearest ancestor that is there, whether or not it is the right one.
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
        there = [by_digest.get(one.digest) or _namesake(one, name, nodes) for one in node.lineage]
        parent = there[-1]
        digest = nodes[parent].digest if parent else None
        if refusal := explain_refusal(name, node.lineage[-1], parent or f"in {place}", digest):
            found.refused[name] = refusal
        # Below a gap, the path goes on with the next ancestor that is there.
        if nearest := next(filter(None, reversed(there)), None):
            found.parents[name] = nearest
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


def _namesake(ancestor: Ancestor, child: str, nodes: Mapping[str, Node]) -> str | None:
    """Another node that is called as the ancestor of a child was."""
    called_so = (name for name in nodes if ancestor.name in (name, name.rpartition("/")[2]))
    return next((name for name in called_so if name != child), None)


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
