"""The nodes of a tree: LoRA files in a folder, and what they say of themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sdlora.errors import AdapterError, RunError, shorten
from sdlora.lora.files import inspect_adapter
from sdlora.lora.lineage import ENDING, KOHYA_ENDING, Ancestor, digest_file, noted_digest, read_lineage
from sdlora.runs import RunFolder


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
        """How many pictures it was trained on; empty if the file does not say."""
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


def spare_files(root: Path) -> dict[str, Path]:
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
        noted_digest(file) or digest_file(file),
        lineage,
        info.rank,
        info.size_bytes,
        info.metadata,
    )
