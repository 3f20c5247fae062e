"""`sdlora doctor --fix`: moves copies aside and removes style words from captions, and undoes it.

Nothing is deleted: `NAME-aside/`, beside the image folder, has what was moved, and the old captions.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from sdlora.data.caption_files import SIDECAR_SUFFIXES
from sdlora.data.records import DatasetIndex, Finding
from sdlora.data.style_words import STYLE, STYLE_TAG
from sdlora.errors import DataError, one_line
from sdlora.reading import UnfitFileError, read_json
from sdlora.writing import next_free_folder, write_json, write_text

UNDO = "undo.json"
MOVED = ("data.copies", "data.near-copies")
MAX_UNDO_BYTES = 2**26


@dataclass(frozen=True)
class Repairs:
    """What `--fix` would do: files to move, by name, and captions to write, with their old text."""

    root: Path
    moves: Sequence[str]
    captions: dict[str, tuple[str, str]]

    def lines(self) -> list[str]:
        """For people to read before they agree."""
        moves = [f"move {name} to {aside_folder(self.root).name}/" for name in self.moves]
        changes = [f"write {name}: {old!r} becomes {new!r}" for name, (old, new) in self.captions.items()]
        return [one_line(line) for line in (*moves, *changes)]

    def apply(self) -> Path:
        """Does it, and returns the folder with the moved files and the undo file."""
        folder = next_free_folder(aside_folder(self.root))
        folder.mkdir(parents=True)
        old = {name: before for name, (before, _) in self.captions.items()}
        # Before the first change: what is listed and did not happen is skipped when undone.
        write_json(
            folder / UNDO, {"root": str(self.root.resolve()), "moved": list(self.moves), "captions": old}
        )
        for name, (_, text) in self.captions.items():
            write_text(self.root / name, text)
        for name in self.moves:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.move(self.root / name, folder / name)
        return folder


def aside_folder(root: Path) -> Path:
    root = root.resolve()
    return root.with_name(f"{root.name}-aside")


def plan_repairs(index: DatasetIndex, findings: Iterable[Finding]) -> Repairs:
    """Copies but one, with their caption files, and style words of caption files."""
    by_key = {finding.key: finding.names for finding in findings}
    # A held-out copy of a training image would be in the validation loss.
    every = (*index.records, *index.heldout)
    inside = [record for record in every if record.path == index.root / record.name]
    records = {record.name: record for record in inside}
    extra = [name for name in by_key.get("data.near-copies", ()) if name in records]
    seen: set[str] = set()
    for record in inside:
        extra += [record.name] if record.digest in seen else []
        seen.add(record.digest)
    extra = list(dict.fromkeys(extra))
    sidecars = {name: _sidecar(index.root, name) for name in records}
    moves = [*extra, *filter(None, (sidecars[name] for name in extra))]
    captions = {}
    for name in by_key.get("data.caption-style", ()):
        file = sidecars.get(name)
        if file and file not in moves:
            old = (index.root / file).read_text(encoding="utf-8", errors="replace")
            if "\ufffd" not in old and (new := strip_style(old)) and new != old:
                captions[file] = (old, new)
    return Repairs(index.root, moves, captions)


def strip_style(text: str) -> str:
    """A caption without the words and tags that name a style; punctuation that is left over goes too."""
    if "\n" in text:  # several captions, each in a line
        return "\n".join(filter(None, map(strip_style, text.splitlines())))
    text = ",".join(part for part in text.split(",") if not STYLE_TAG.fullmatch(part.strip()))
    text = " ".join(STYLE.sub(" ", text).split())
    parts = (
        re.sub(r"\b(?:in|as|and|with|an?|the)$", "", part.strip(" .")).strip() for part in text.split(",")
    )
    return ", ".join(filter(None, parts))


def _sidecar(root: Path, name: str) -> str | None:
    stem = PurePosixPath(name).with_suffix("")
    paths = (f"{start}{suffix}" for suffix in SIDECAR_SUFFIXES for start in (stem, name))
    return next((path for path in paths if (root / path).is_file()), None)


def undo_repairs(root: Path) -> int:
    """Moves everything back and restores captions, the newest repair first; returns the number of files.

    Raises:
        DataError: If there is nothing to undo, or a file is in the way.
    """
    folders = sorted(aside_folder(root).parent.glob(f"{aside_folder(root).name}*/{UNDO}"))
    if not folders:
        raise DataError(f"nothing to undo: no {aside_folder(root)} with {UNDO}", key="data.undo")
    folder = max(folders, key=lambda file: file.stat().st_mtime_ns).parent
    try:
        undo: dict[str, Any] = read_json(folder / UNDO, MAX_UNDO_BYTES)
        moved, captions = list(map(str, undo["moved"])), dict(undo["captions"])
    except (OSError, UnfitFileError, KeyError, TypeError, ValueError):
        raise DataError(
            f"{folder / UNDO} cannot be read; move the files back by hand", key="data.undo"
        ) from None
    inside = [name for name in (*moved, *captions) if (root / name).resolve().is_relative_to(root.resolve())]
    if blocked := [name for name in moved if (folder / name).exists() and (root / name).exists()]:
        raise DataError(
            f"{root / blocked[0]} is in the way of the one in {folder}; rename it", key="data.undo"
        )
    count = 0
    for name in moved:
        if name in inside and (folder / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.move(folder / name, root / name)
            count += 1
    for name, text in captions.items():
        if name in inside:
            write_text(root / name, str(text))
            count += 1
    (folder / UNDO).rename(folder / "undone.json")
    return count
