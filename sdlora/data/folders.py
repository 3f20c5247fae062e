"""Walks an image folder: its files, its repeats, and what to say when there are no images."""

from __future__ import annotations

import difflib
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path, PurePosixPath

from sdlora.data.heldout import HELDOUT, is_heldout
from sdlora.data.images import IMAGE_SUFFIXES
from sdlora.data.records import join_names
from sdlora.errors import DataError


@dataclass
class Listing:
    """The files below a folder, relative, with forward slashes."""

    files: list[str] = field(default_factory=list)
    hidden_images: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)

    @property
    def images(self) -> list[str]:
        """Those that are pictures by name."""
        return [name for name in self.files if is_image(name)]


def is_image(name: str) -> bool:
    """Whether a file's name says that it is a picture."""
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES


def list_files(root: Path) -> Listing:
    """Walks a folder in a fixed order, through links too but never in circles."""
    listing = Listing()
    visited: set[tuple[int, int]] = set()

    def walk(folder: Path, prefix: str, hidden: bool) -> None:
        try:
            status = folder.stat()
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            listing.unreadable.append(prefix.rstrip("/") or str(root))
            return
        if (status.st_dev, status.st_ino) in visited:
            return
        visited.add((status.st_dev, status.st_ino))
        for entry in entries:
            name, ignored = prefix + entry.name, hidden or _is_ignored(entry.name)
            if entry.is_dir():
                walk(Path(entry.path), f"{name}/", ignored)
            elif not ignored:
                listing.files.append(name)
            elif is_image(name) and not entry.name.startswith("._"):
                listing.hidden_images.append(name)

    walk(root, "", False)
    return listing


def _is_ignored(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def read_repeats(root: Path, name: str) -> int:
    """N of the nearest `N_name` folder above a file, the image folder itself included."""
    for folder in (*reversed(PurePosixPath(name).parts[:-1]), root.absolute().name):
        match = re.fullmatch(r"([1-9]\d*)_.+", folder)
        if match:
            return int(match[1])
    return 1


def check_folder(root: Path) -> None:
    """Raises a DataError if a folder is not there."""
    if root.is_dir():
        return
    if root.exists():
        raise DataError(f"image folder {root} is a file; give the folder that it is in: {root.parent}")
    parent = root.absolute().parent
    siblings = [entry.name for entry in parent.iterdir() if entry.is_dir()] if parent.is_dir() else []
    guess = difflib.get_close_matches(root.name, siblings, 1, 0.5)
    remedy = f"did you mean {root.parent / guess[0]}?" if guess else "check the path"
    raise DataError(f"image folder {root} does not exist; {remedy}")


def describe_nothing(root: Path, listing: Listing) -> str:
    """R-26: what is there instead, and where the nearest images are."""
    message = f"no images to train on in {root}"
    kinds = Counter(PurePosixPath(name).suffix.lower() or "without a suffix" for name in listing.files)
    found = join_names(f"{number} {kind}" for kind, number in kinds.most_common())
    message += f" (found: {found})" if found else " (it is empty)"
    if any(is_heldout(name) for name in listing.images):
        return f"{message}; all images are in {HELDOUT}, which is never trained on; move some out of it"
    if listing.hidden_images:
        return f"{message}; hidden folders hold images, such as {listing.hidden_images[0]}; move them out"
    near = _nearest_images(root.absolute())
    remedy = f"the nearest folder with images is {near}" if near else "give a folder with images"
    return f"{message}; {remedy}"


def _nearest_images(root: Path) -> Path | None:
    """Looks up to three levels up, and there two levels down, but not through a whole disk."""
    for above in root.parents[:3]:
        for folder in islice(_folders_below(above, 2), 500):
            if folder != root and _has_image(folder):
                return folder
    return None


def _folders_below(folder: Path, depth: int) -> Iterator[Path]:
    level = [folder]
    for _ in range(depth + 1):
        yield from level
        following: list[Path] = []
        for parent in level:
            try:
                following += sorted(
                    Path(entry.path)
                    for entry in os.scandir(parent)
                    if entry.is_dir() and not _is_ignored(entry.name)
                )
            except OSError:
                continue
        level = following


def _has_image(folder: Path) -> bool:
    try:
        return any(is_image(entry.name) for entry in islice(os.scandir(folder), 1000))
    except OSError:
        return False
