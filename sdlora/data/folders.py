"""Walks an image folder: its files, its repeats, and what to say when there are no images."""

from __future__ import annotations

import difflib
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path, PurePosixPath

from sdlora.data.heldout import HELDOUT, is_heldout
from sdlora.data.images import IMAGE_SUFFIXES
from sdlora.errors import DataError, join_names, shorten, unfit_letters

LINKS_REMEDY = "copy what they point to, or set data.follow_links=true"


@dataclass
class Listing:
    """The files below a folder, relative, with forward slashes."""

    files: list[str] = field(default_factory=list)
    hidden_images: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    unfit: dict[str, str] = field(default_factory=dict)
    """What is no file that can be read, and why."""
    outward: dict[str, str] = field(default_factory=dict)
    """Links that lead out of the folder, and where to; they are not followed."""

    @property
    def images(self) -> list[str]:
        """Those that are images by name."""
        return [name for name in self.files if is_image(name)]


def is_image(name: str) -> bool:
    """Whether a file's name says that it is an image."""
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES


def list_files(root: Path, follow_links: bool = False) -> Listing:
    """Walks a folder in a fixed order, never in circles.

    Args:
        root: The folder; it may be a link itself.
        follow_links: Also follows links that lead out of it. What is in somebody's archive could else
            bring any file of this machine into a run, and into the metadata of what it writes.
    """
    listing = Listing()
    home = Path(os.path.realpath(root))
    visited: set[tuple[int, int]] = set()
    folders = [(root, "", False)]
    while folders:
        folder, prefix, hidden = folders.pop()
        try:
            status = folder.stat()
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            listing.unreadable.append(prefix.rstrip("/") or str(root))
            continue
        if (status.st_dev, status.st_ino) in visited:
            continue
        visited.add((status.st_dev, status.st_ino))
        inner = []
        for entry in entries:
            name, ignored = prefix + entry.name, hidden or _is_ignored(entry.name)
            kind = _kind_of(entry)
            if not follow_links and entry.is_symlink():
                target = Path(os.path.realpath(entry.path))
                if not target.is_relative_to(home):
                    if not ignored:
                        listing.outward[name] = str(target)
                    continue
            if kind == "folder":
                inner.append((Path(entry.path), f"{name}/", ignored))
            elif ignored:
                if is_image(name) and not entry.name.startswith("._"):
                    listing.hidden_images.append(name)
            elif kind != "file":
                listing.unfit[name] = kind
            elif unfit_letters(name):
                listing.unfit[name] = "has a name that is not text; rename it"
            else:
                listing.files.append(name)
        folders += reversed(inner)
    listing.files.sort()
    return listing


def _kind_of(entry: os.DirEntry[str]) -> str:
    """`file`, `folder`, or why it is neither."""
    try:
        mode = entry.stat().st_mode
    except OSError as error:
        return "is a link to nothing" if entry.is_symlink() else f"cannot be read ({error.strerror})"
    if stat.S_ISDIR(mode):
        return "folder"
    return "file" if stat.S_ISREG(mode) else "is a pipe or a device, not a file"


def _is_ignored(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def read_repeats(root: Path, name: str) -> int:
    """N of the nearest `N_name` folder above a file, the image folder itself included."""
    for folder in (*reversed(PurePosixPath(name).parts[:-1]), root.absolute().name):
        match = re.fullmatch(r"([1-9][0-9]{0,8})_.+", folder)
        if match:
            return int(match[1])
    return 1


def check_folder(root: Path) -> None:
    """Raises a DataError if a folder is not there."""
    try:
        is_folder, is_there = root.is_dir(), root.exists()
    except OSError as error:
        raise DataError(f"image folder {shorten(str(root))} cannot be opened: {error.strerror}") from None
    if is_folder:
        return
    if is_there:
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
    is_empty = not (listing.files or listing.outward or listing.unfit or listing.hidden_images)
    message += f" (found: {found})" if found else " (it is empty)" if is_empty else ""
    if listing.outward:
        name, target = next(iter(listing.outward.items()))
        return f"{message}; links lead out of it, such as {name} -> {target}; {LINKS_REMEDY}"
    if listing.unfit:
        name, reason = next(iter(listing.unfit.items()))
        return f"{message}; {name} {reason}"
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
