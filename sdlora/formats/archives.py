"""Zip archives of runs and LoRA files, unpacked into the cache."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

from sdlora.data.sources import unpack
from sdlora.errors import AdapterError, join_names
from sdlora.runs import RunFolder

ENDINGS = (".safetensors", ".json", ".jsonl")


def open_archive(source: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """The run folder or LoRA file in a zip archive; anything else as it is.

    Raises:
        AdapterError: If the archive has neither, or several.
        DataError: If it is damaged, hostile or too large.
    """
    archive = Path(source)
    if archive.suffix.lower() != ".zip" or not archive.is_file():
        return source
    folder = unpack(archive, _is_used, "lora")
    found = [file.parent for file in folder.rglob("config.json") if RunFolder(file.parent).adapters.is_dir()]
    if not found:
        files = list(folder.rglob("*.safetensors"))
        found = [file for file in files if not file.name.endswith(".kohya.safetensors")] or files
    if len(found) == 1:
        return found[0]
    if not found:
        problem = f"{archive} contains neither a run nor a LoRA file"
        raise AdapterError(f"{problem}; zip a run folder, or a .safetensors file", key="lora.archive")
    names = join_names(sorted(path.relative_to(folder).as_posix() for path in found), 3)
    problem = f"{archive} contains {len(found)} runs or LoRA files ({names})"
    raise AdapterError(f"{problem}; unpack it, and name one", key="lora.archive")


def _is_used(path: PurePosixPath) -> bool:
    """Whether a run is read from this file; not to continue it."""
    is_hidden = any(part.startswith((".", "__MACOSX")) for part in path.parts)
    return path.suffix in ENDINGS and not is_hidden and "checkpoints" not in path.parts
