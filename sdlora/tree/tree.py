"""A folder of LoRA files as a tree: each node was trained on the base plus the sum of its ancestors.

The name of a node is its path in the folder without the ending; its parent is the file with the tensors that
it was trained on, wherever that file lies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sdlora.errors import AdapterError
from sdlora.formats.files import ENDING, KOHYA_ENDING, load_adapter
from sdlora.lora.adapter import Adapter
from sdlora.lora.attach import detach, mount
from sdlora.lora.kinds import Scale
from sdlora.lora.layers import DENOISER
from sdlora.notebook import show_html
from sdlora.rank.merge import merge
from sdlora.rank.resize import ResizeReport, resize
from sdlora.tree.lineage import (
    LINEAGE,
    PARENT,
    Stack,
    check_additive,
    digest_adapter,
    digest_file,
    recorded_digest,
    short_digest,
)
from sdlora.tree.nodes import Node, find_files, find_saved_adapters, link_parents, path_to, read_node


class AdapterTree:
    """Nodes and their parents.

    Attributes:
        nodes: Nodes by name.
        parents: Node to parent, or to the nearest ancestor that was found, even if it is not the right one.
        errors: Node to the reason why it must not be used.
        problems: Files that cannot be nodes, and copies, one line each.
    """

    def __init__(self, folder: Path, nodes: Mapping[str, Node], problems: Sequence[str] = ()) -> None:
        self.folder = folder
        self.nodes = dict(sorted(nodes.items()))
        self.parents, self.errors, copies = link_parents(self.nodes, str(folder))
        self.problems = [*problems, *copies]
        self._loaded: dict[tuple[str, str], Adapter] = {}

    def __repr__(self) -> str:
        return f"AdapterTree({str(self.folder)!r}: {', '.join(self.nodes)})"

    def _repr_html_(self) -> str:
        lines = [
            f"{name}  (rank {node.rank}, {node.images or '?'} images)" for name, node in self.nodes.items()
        ]
        return show_html(f"tree {self.folder}", [*lines, *self.problems])

    @classmethod
    def from_folder(cls, folder: str | Path) -> AdapterTree:
        """Reads the headers of all LoRA files in a folder and its subfolders.

        The node of a run folder is its final adapter; another adapter of a run is a node if it is a parent.
        Files that are not LoRAs are problems; a folder without any LoRA file is an AdapterError.
        """
        root = Path(folder)
        if not root.is_dir():
            raise AdapterError(f"{folder} is not a folder; use one with LoRA files", key="tree.no-folder")
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
            lines = [f"{folder} contains no LoRA file; use another folder", *problems]
            raise AdapterError("\n".join(lines), key="tree.empty")
        return cls(root, nodes, problems)

    def node(self, name: str) -> Node:
        """The node of a name; raises an AdapterError if there is none."""
        if name not in self.nodes:
            message = f"tree {self.folder} has no node {name}; choose from {', '.join(self.nodes)}"
            raise AdapterError(message, key="tree.no-node")
        return self.nodes[name]

    def children(self, name: str | None) -> list[Node]:
        """The nodes that were trained on one; the roots for None."""
        return [node for node in self.nodes.values() if self.parents.get(node.name) == name]

    def path(self, name: str, *, force: bool = False) -> list[Node]:
        """A node and its ancestors, the root first.

        Raises an AdapterError if a parent on the path is changed or missing; `force` takes or skips it.
        """
        if not force and (errors := self.path_errors(name)):
            raise errors[0]
        return [self.nodes[step] for step in path_to(name, self.parents)]

    def path_errors(self, name: str) -> list[AdapterError]:
        """The errors of all nodes of a path, which `force` ignores."""
        path = path_to(self.node(name).name, self.parents)
        return [self.errors[step] for step in path if step in self.errors]

    def verify(self) -> list[str]:
        """Reads all tensors, which finds wrong digests in headers too; returns a line for each problem."""
        lines = [*self.problems, *map(str, self.errors.values())]
        for name, node in self.nodes.items():
            twin = node.file.with_name(node.file.name.removesuffix(ENDING) + KOHYA_ENDING)
            for file in filter(Path.is_file, (node.file, twin)):
                try:
                    _check_digest(file, digest_file(file), node.digest)
                except AdapterError as error:
                    lines.append(f"{name}: {error}")
        return lines

    def load(self, name: str, device: torch.device | str = "cpu") -> Adapter:
        """The adapter of a node in fp32, loaded once for each device, with its digest checked."""
        key = (name, str(device))
        if key not in self._loaded:
            node = self.node(name)
            adapter = load_adapter(node.file, dtype=None)
            _check_digest(node.file, digest_adapter(adapter), node.digest)
            self._loaded[key] = adapter.to(device, torch.float32)
        return self._loaded[key]

    def load_stack(self, path: Mapping[str, float], device: torch.device | str = "cpu") -> Stack:
        """The adapters of a path from `strengths`; several must be of a kind that can be added."""
        stack = tuple((self.load(name, device), strength) for name, strength in path.items())
        for name, (adapter, _) in zip(path, stack, strict=True):
            if len(path) > 1:
                check_additive(self.node(name).file, adapter)
        return stack

    def strengths(
        self, names: Sequence[str | None], changes: Mapping[str, float] | None = None, *, force: bool = False
    ) -> list[dict[str, float]]:
        """The path to each node (None is the base), the root first, with the strengths of the training.

        `changes`, by node name, replace these. Raises an AdapterError if a parent is changed or missing and
        `force` is not set, or if `changes` names a node of no path.
        """
        changes = changes or {}
        rows: list[dict[str, float]] = []
        for name in names:
            path = self.path(name, force=force) if name is not None else []
            trained = {ancestor.digest: ancestor.strength for node in path[-1:] for ancestor in node.lineage}
            rows.append({node.name: trained.get(node.digest, 1.0) for node in path})
        if unknown := sorted(set(changes) - {step for row in rows for step in row}):
            paths = " and ".join(" > ".join(row) for row in rows if row)
            message = f"--strengths names {', '.join(unknown)}, which is not on the path {paths}"
            raise AdapterError(message, key="tree.not-on-path")
        return [{step: changes.get(step, own) for step, own in row.items()} for row in rows]

    def mount(
        self,
        pipe: Any,
        names: str | Sequence[str | None] | None,
        *,
        strengths: Mapping[str, float] | None = None,
        force: bool = False,
    ) -> None:
        """Mounts the path of a node on a pipeline, in place of mounted adapters.

        Nothing is fused: base weights keep every bit, and a switch takes milliseconds.
        `pipe.save_pretrained` writes the base; `flatten` and `merge-into-base` include a node.

        Args:
            pipe: A stock diffusers pipeline.
            names: A node, or one for each sample of the next batches; None is the base.
            strengths: Strengths by node name that replace those of the training.
            force: As in `path`.

        Raises:
            AdapterError: For an unknown node, a changed or missing parent, or kinds that cannot be added.
        """
        model = _components(pipe)
        device = next(model[DENOISER].parameters()).device
        steps = [names] if names is None or isinstance(names, str) else names
        rows = self.strengths(steps, strengths, force=force)
        for row in rows:
            self.load_stack(row, device)
        stack: list[tuple[Adapter, Scale]] = []
        for step in dict.fromkeys(step for row in rows for step in row):
            values = [row.get(step, 0.0) for row in rows]
            stack.append((self.load(step, device), values[0] if len(values) == 1 else torch.tensor(values)))
        mount(model, stack)

    def unmount(self, pipe: Any) -> None:
        """Takes all adapters off a pipeline, which draws as its base then."""
        detach(_components(pipe))

    def flatten(
        self,
        name: str,
        *,
        strengths: Mapping[str, float] | None = None,
        rank: int | None = None,
        force: bool = False,
    ) -> tuple[Adapter, ResizeReport | None]:
        """Merges a node and its ancestors into one ordinary adapter.

        `strengths`, by node name, replace those of the training; `force` is as in `path`. The rank is by
        default the sum of the ranks, without loss.
        """
        path = self.strengths([name], strengths, force=force)[0]
        parts = [(replace(self.load(step), parent=None), strength) for step, strength in path.items()]
        joined, _ = merge(parts)
        outdated = {PARENT, LINEAGE} | ({"sdlora.heldout_loss"} if strengths or force else set())
        own = {key: text for key, text in self.node(name).notes.items() if key not in outdated}
        joined = replace(joined, notes={**own, "sdlora.flattened": " > ".join(path)})
        return (joined, None) if rank is None else resize(joined, rank=rank)


def _check_digest(file: Path, found: str, expected: str) -> None:
    if found != expected:
        raise AdapterError(
            f"{file} was changed: its digest is {short_digest(found)}, not {short_digest(expected)}; restore "
            "the old file, or export it again",
            key="tree.file-changed",
        )


def _components(pipe: Any) -> dict[str, nn.Module]:
    """The networks of a pipeline that adapters can be mounted on."""
    parts = {name: getattr(pipe, name, None) for name in (DENOISER, "text_encoder", "text_encoder_2")}
    found = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
    if DENOISER not in found:
        message = f"{type(pipe).__name__} has no denoiser; pass a Stable Diffusion pipeline"
        raise AdapterError(message, key="tree.no-denoiser")
    return found
