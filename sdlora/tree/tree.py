"""A folder of LoRA files as a tree: each node was trained on the base plus the sum of its ancestors.

There is no database. A node's name is its path in the folder without the ending; its parent is the file with
the tensors that it was trained on, wherever that lies and whatever it is called.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sdlora.errors import AdapterError
from sdlora.formats.files import load_adapter
from sdlora.lora.adapter import Adapter
from sdlora.lora.attach import detach, mount
from sdlora.lora.kinds import Scale
from sdlora.rank.merge import merge
from sdlora.rank.resize import ResizeReport, resize
from sdlora.tree.lineage import (
    ENDING,
    KOHYA_ENDING,
    LINEAGE,
    PARENT,
    digest_adapter,
    digest_file,
    recorded_digest,
    short_digest,
)
from sdlora.tree.nodes import Node, find_files, find_saved_adapters, link_parents, path_to, read_node


@dataclass(frozen=True)
class SwitchPlan:
    """How to come from one node to another: up to the lowest common ancestor, and down.

    Args:
        pop: Taken off, the lowest first.
        push: Put on, the highest first.
    """

    pop: tuple[str, ...]
    push: tuple[str, ...]


class AdapterTree:
    """Nodes, their parents, and the ways between them.

    Args:
        folder: For messages.
        nodes: By name.
        problems: Files that are no nodes, one line each.
    """

    def __init__(self, folder: Path, nodes: Mapping[str, Node], problems: Sequence[str] = ()) -> None:
        self.folder = folder
        self.nodes = dict(sorted(nodes.items()))
        parentage = link_parents(self.nodes, str(folder))
        self.problems = [*problems, *parentage.problems]
        self.parents = parentage.parents
        """Node to parent, or to the nearest ancestor that is there, whether or not it is the right one."""
        self.refused = parentage.refused
        """Node to the line that says why it must not be used."""
        self._loaded: dict[tuple[str, str], Adapter] = {}

    def __repr__(self) -> str:
        return f"AdapterTree({str(self.folder)!r}: {', '.join(self.nodes)})"

    @classmethod
    def from_folder(cls, folder: str | Path) -> AdapterTree:
        """Reads the headers of all LoRA files in a folder, and below it.

        A run folder is one node, its final adapter; another one that it has saved is a node where one stands
        on that. Files that are no LoRAs are problems, not errors.

        Raises:
            AdapterError: If there is no folder, or nothing in it.
        """
        root = Path(folder)
        if not root.is_dir():
            raise AdapterError(f"tree {folder} is no folder; give one that holds LoRA files")
        nodes: dict[str, Node] = {}
        problems: list[str] = []
        for name, file in find_files(root).items():
            try:
                nodes[name] = read_node(name, file)
            except AdapterError as error:
                problems.append(str(error))
        wanted = {ancestor.digest for node in nodes.values() for ancestor in node.lineage}
        wanted -= {node.digest for node in nodes.values()}
        for name, file in (find_saved_adapters(root) if wanted else {}).items():
            with suppress(AdapterError):
                if recorded_digest(file) in wanted:
                    nodes[name] = read_node(name, file)
                    wanted.remove(nodes[name].digest)
        if not nodes:
            raise AdapterError(
                "\n".join([f"tree {folder} holds no LoRA file; give another folder", *problems])
            )
        return cls(root, nodes, problems)

    def node(self, name: str) -> Node:
        """A node by name.

        Raises:
            AdapterError: If there is none; names those that are.
        """
        if name not in self.nodes:
            raise AdapterError(f"tree {self.folder} has no node {name}; it has {', '.join(self.nodes)}")
        return self.nodes[name]

    def parent(self, name: str) -> Node | None:
        """The node that one was trained on; None for a root."""
        parent = self.parents.get(self.node(name).name)
        return self.nodes[parent] if parent else None

    def children(self, name: str | None) -> list[Node]:
        """The nodes right below one; None gives the roots."""
        return [node for node in self.nodes.values() if self.parents.get(node.name) == name]

    def path(self, name: str, *, force: bool = False) -> list[Node]:
        """The node and all above it, the root first.

        Args:
            name: The node.
            force: Takes wrong parents for right ones, and goes without missing ones.

        Raises:
            AdapterError: If one of them stands on a wrong, changed or missing parent.
        """
        if not force and (lines := self.refusals(name)):
            raise AdapterError(lines[0])
        return [self.nodes[step] for step in path_to(name, self.parents)]

    def refusals(self, name: str) -> list[str]:
        """Why a node must not be used, one line for each step of its path; `force` uses it nevertheless."""
        path = path_to(self.node(name).name, self.parents)
        return [self.refused[step] for step in path if step in self.refused]

    def common_ancestor(self, first: str, second: str) -> Node | None:
        """The lowest node that is on both paths (a node is on its own); None if only the base is."""
        shared = [a for a, b in zip(self.path(first), self.path(second), strict=False) if a is b]
        return shared[-1] if shared else None

    def switch_plan(self, start: str | None, end: str | None) -> SwitchPlan:
        """What to take off and to put on; None is the base."""
        before = [node.name for node in self.path(start)] if start else []
        after = [node.name for node in self.path(end)] if end else []
        shared = sum(1 for a, b in zip(before, after, strict=False) if a == b)
        return SwitchPlan(tuple(reversed(before[shared:])), tuple(after[shared:]))

    def verify(self) -> list[str]:
        """Every problem, one line each; reads all tensors, so a file that says a wrong digest is found."""
        lines = [*self.problems, *self.refused.values()]
        for name, node in self.nodes.items():
            twin = node.file.with_name(node.file.name.removesuffix(ENDING) + KOHYA_ENDING)
            for file in filter(Path.is_file, (node.file, twin)):
                try:
                    digest = digest_file(file)
                except AdapterError as error:
                    lines.append(f"{name}: {error}")
                    continue
                if digest != node.digest:
                    lines.append(
                        f"{name}: {file} holds {short_digest(digest)} where {short_digest(node.digest)} is expected; "
                        "put the old file back, or export it again"
                    )
        return lines

    def load(self, name: str, device: torch.device | str = "cpu") -> Adapter:
        """A node's own adapter in fp32, once for each device.

        Raises:
            AdapterError: If the file does not hold what its header says.
        """
        key = (name, str(device))
        if key not in self._loaded:
            node = self.node(name)
            adapter = load_adapter(node.file, dtype=None)
            digest = digest_adapter(adapter)
            if digest != node.digest:
                raise AdapterError(
                    f"{node.file} holds {short_digest(digest)} where {short_digest(node.digest)} is expected; "
                    "it was changed, so put the old file back, or export it again"
                )
            self._loaded[key] = adapter.to(device, torch.float32)
        return self._loaded[key]

    def strengths(
        self,
        names: Sequence[str | None],
        changes: Mapping[str, float] | None = None,
        *,
        force: bool = False,
    ) -> list[dict[str, float]]:
        """The path to each node, the root first, with the strength of each step: as trained, unless changed.

        Args:
            names: Nodes; None is the base, whose path is empty.
            changes: By node name.
            force: As in `path`.

        Raises:
            AdapterError: If a node stands on a wrong parent, or a change is for none of the paths.
        """
        rows: list[dict[str, float]] = []
        for name in names:
            row: dict[str, float] = {}
            if name is not None:
                *above, node = self.path(name, force=force)
                trained = {ancestor.digest: ancestor.strength for ancestor in node.lineage}
                row = {step.name: trained.get(step.digest, 1.0) for step in above} | {name: 1.0}
            rows.append(row)
        paths = " and ".join(" > ".join(row) for row in rows if row)
        if strange := sorted(set(changes or {}) - {step for row in rows for step in row}):
            raise AdapterError(f"strengths name {', '.join(strange)}, which is not on the path {paths}")
        return [{step: (changes or {}).get(step, own) for step, own in row.items()} for row in rows]

    def mount(
        self,
        pipe: Any,
        names: str | Sequence[str | None] | None,
        *,
        strengths: Mapping[str, float] | None = None,
        force: bool = False,
    ) -> None:
        """Makes a pipeline draw like a node: what is mounted is taken off, the node's path is put on.

        Nothing is fused, so base weights stay as they are to the last bit, and a switch takes milliseconds.
        What `pipe.save_pretrained` writes is the base; `flatten` and `merge-into-base` take a node along.

        Args:
            pipe: A stock diffusers pipeline.
            names: A node, or one for each sample of the batches to come; None is the base.
            strengths: By node name, where another than the one of the training is wanted.
            force: As in `path`.

        Raises:
            AdapterError: If there is no such node, or one stands on a wrong, changed or missing parent.
        """
        model = _components(pipe)
        device = next(model["unet"].parameters()).device
        steps = [names] if names is None or isinstance(names, str) else names
        rows = self.strengths(steps, strengths, force=force)
        stack: list[tuple[Adapter, Scale]] = []
        for step in dict.fromkeys(step for row in rows for step in row):
            values = [row.get(step, 0.0) for row in rows]
            stack.append((self.load(step, device), values[0] if len(values) == 1 else torch.tensor(values)))
        mount(model, stack)

    def unmount(self, pipe: Any) -> None:
        """Gives a pipeline its own layers back."""
        detach(_components(pipe))

    def flatten(
        self,
        name: str,
        *,
        strengths: Mapping[str, float] | None = None,
        rank: int | None = None,
        force: bool = False,
    ) -> tuple[Adapter, ResizeReport | None]:
        """One ordinary adapter that does what a node does on top of its ancestors.

        Args:
            name: The node.
            strengths: By node name, where another than the one of the training is wanted.
            rank: The nearest adapter of this rank; not given, ranks are joined and nothing is lost.
            force: As in `path`.

        Returns:
            The adapter, and what a given rank has cost.
        """
        path = self.strengths([name], strengths, force=force)[0]
        parts = [(replace(self.load(step), parent=None), strength) for step, strength in path.items()]
        joined, _ = merge(parts)
        own = {key: text for key, text in self.node(name).notes.items() if key not in (PARENT, LINEAGE)}
        if strengths or force:
            own.pop("sdlora.heldout_loss", None)
        joined = replace(joined, notes={**own, "sdlora.flattened": " > ".join(path)})
        return (joined, None) if rank is None else resize(joined, rank=rank)


def _components(pipe: Any) -> dict[str, nn.Module]:
    """The parts of a pipeline that can carry adapters."""
    parts = {name: getattr(pipe, name, None) for name in ("unet", "text_encoder", "text_encoder_2")}
    found = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
    if "unet" not in found:
        raise AdapterError(f"{type(pipe).__name__} has no UNet; give a Stable Diffusion pipeline")
    return found
