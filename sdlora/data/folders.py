"""Walks an image folder: its files, its repeats, and why it has no images."""

from __future__ import annotations

import difflib
import os
import re
import stat
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path, PurePosixPath

from sdlora.config import DataSection
from sdlora.data.images import IMAGE_SUFFIXES, UNREAD_SUFFIXES
from sdlora.data.records import Noticed
from sdlora.errors import DataError, join_names, shorten, unfit_letters

HELDOUT = "heldout"
# Folders of systems and network storage: thumbnails, deleted files, snapshots.
SYSTEM_FOLDERS = (
    *("@eadir", "@recycle", "@recently-snapshot", "@__thumb", "@tmp", "@synoresource", "#recycle"),
    *("#snapshot", "$recycle.bin", "system volume information", "lost+found", "__pycache__"),
)
# The folders of a kohya project beside `img/`, which has the images to train on.
PROJECT_FOLDERS = ("reg", "log", "model")
REPEATS = re.compile(r"([0-9]{1,9})_.+")
# Masks of OneTrainer, and of images with the same name.
MASK = re.compile(r"(.+)(-masklabel|-condlabel|\.mask)")
SEARCH_UP, SEARCH_DOWN, MAX_SEARCHED = 3, 2, 500


def is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES


def is_heldout(name: str) -> bool:
    """Whether a file is in a folder named `heldout`, at any depth."""
    return HELDOUT in PurePosixPath(name).parts[:-1]


def list_files(root: Path, noticed: Noticed, *, follow_links: bool = False) -> list[str]:
    """Lists all files below a folder: relative, with forward slashes, sorted.

    Links out of the folder are not followed by default: a downloaded archive could bring any file of this
    machine into a run, and into the metadata of its adapters.
    """
    files: list[str] = []
    home = Path(os.path.realpath(root))
    visited: set[tuple[int, int]] = set()
    folders = [(root, "", False)]
    while folders:
        folder, prefix, is_hidden = folders.pop()
        try:
            status = folder.stat()
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            noticed["data.folder-unreadable"][prefix.rstrip("/") or str(root)] = ""
            continue
        if (status.st_dev, status.st_ino) in visited:
            continue
        visited.add((status.st_dev, status.st_ino))
        inner = []
        for entry in entries:
            name, is_ignored = prefix + entry.name, is_hidden or _is_ignored(entry.name)
            target = Path(os.path.realpath(entry.path)) if entry.is_symlink() else home
            if not follow_links and not target.is_relative_to(home):
                if not is_ignored:
                    noticed["data.link-outside"][name] = f"-> {target}"
                continue
            problem = _problem_of(entry, name)
            if problem == "folder":
                inner.append((Path(entry.path), f"{name}/", is_ignored))
            elif is_ignored:
                if is_image(name) and not entry.name.startswith("._"):
                    noticed["data.image-hidden"][name] = ""
            elif problem:
                noticed["data.image-unreadable" if is_image(name) else "data.file-unreadable"][name] = problem
            else:
                files.append(name)
        folders += reversed(inner)
    unread = [name for name in files if PurePosixPath(name).suffix.lower() in UNREAD_SUFFIXES]
    noticed["data.image-format"] |= dict.fromkeys(unread, "")
    return sorted(files)


def list_usable(root: Path, noticed: Noticed, settings: DataSection) -> list[str]:
    """Lists the files that training may use: not what systems and other trainers keep beside the images."""
    files = list_files(root, noticed, follow_links=settings.follow_links)
    if settings.rules == 1:
        return files
    stems = {str(PurePosixPath(name).with_suffix("")) for name in files if is_image(name)}
    numbered = {name.partition("/")[0] for name in files if is_image(name) and _repeats_below(name)}
    is_project = "img" in numbered and any(
        name.startswith(f"{part}/") for name in files for part in PROJECT_FOLDERS
    )
    # Folders that the user named are never another tool's.
    asked = tuple(f"{PurePosixPath(one.folder)}/" for one in settings.sets)
    kept = set(files)
    runs = tuple(
        f"{place}/"
        for name in files
        if name.endswith("/environment.json")
        and f"{(place := PurePosixPath(name).parent)}/config.json" in kept
    )
    usable = []
    for name in files:
        top, folders = name.partition("/")[0], PurePosixPath(name).parts[:-1]
        mask = MASK.fullmatch(str(PurePosixPath(name).with_suffix("")))
        if any(folder.lower() in SYSTEM_FOLDERS for folder in folders):
            key = "data.image-system"
        elif top == "reg" and "reg" in numbered and len(numbered) > 1 and not name.startswith(asked):
            key = "data.regularization"
        elif is_project and top not in ("img", HELDOUT) and not name.startswith(asked):
            key = "data.image-project"
        elif name.startswith(runs) and not name.startswith(asked):
            key = "data.image-run"
        elif mask and is_image(name) and (mask[2] != ".mask" or mask[1] in stems):
            key = "data.image-mask"
        elif _repeats_below(name) == 0:
            key = "data.repeats-zero"
        else:
            usable.append(name)
            continue
        if is_image(name):
            noticed[key][name] = ""
    return usable


def _repeats_below(name: str) -> int | None:
    """N of the nearest `N_name` folder above a file, inside the image folder; None if there is none."""
    found = (REPEATS.fullmatch(folder) for folder in reversed(PurePosixPath(name).parts[:-1]))
    return next((int(match[1]) for match in found if match), None)


def _problem_of(entry: os.DirEntry[str], name: str) -> str:
    """`folder`, or why an entry is not a usable file; empty if it is one."""
    try:
        mode = entry.stat().st_mode
    except OSError as error:
        return "is a broken link" if entry.is_symlink() else f"cannot be read ({error.strerror})"
    if stat.S_ISDIR(mode):
        return "folder"
    if not stat.S_ISREG(mode):
        return "is a pipe or a device, not a file"
    return "has unprintable characters in its name; rename it" if unfit_letters(name) else ""


def _is_ignored(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def read_repeats(root: Path, name: str) -> int:
    """N of the nearest `N_name` folder above a file, the image folder itself included."""
    for folder in (*reversed(PurePosixPath(name).parts[:-1]), root.absolute().name):
        if match := re.fullmatch(r"([1-9][0-9]{0,8})_.+", folder):
            return int(match[1])
    return 1


def check_folder(root: Path) -> None:
    """Raises a DataError with the nearest name if a path is not a folder."""
    try:
        if root.is_dir():
            return
        exists = root.exists()
    except OSError as error:
        message = f"cannot open image folder {shorten(str(root))}: {error.strerror}"
        raise DataError(message, key="data.folder-unreadable") from None
    if exists:
        remedy = "unpack it" if root.suffix == ".zip" else f"pass the folder that contains it: {root.parent}"
        message = f"image folder {root} is a file; {remedy}"
        raise DataError(message, key="data.folder-is-file")
    parent = root.absolute().parent
    siblings = [entry.name for entry in parent.iterdir() if entry.is_dir()] if parent.is_dir() else []
    guess = difflib.get_close_matches(root.name, siblings, 1, 0.5)
    remedy = f"did you mean {root.parent / guess[0]}?" if guess else "check the path"
    raise DataError(f"image folder {root} does not exist; {remedy}", key="data.folder-missing")


def no_images_error(root: Path, files: Sequence[str], noticed: Noticed) -> DataError:
    """Names the files that were found, why they are not used, and the nearest folder with images."""
    suffixes = Counter(PurePosixPath(name).suffix.lower() or "without a suffix" for name in files)
    found = join_names(f"{number} {suffix}" for suffix, number in suffixes.most_common())
    message = f"no images to train on in {root}"
    message += f" (found: {found})" if found else "" if any(noticed.values()) else " (it is empty)"
    for key, remedy in (
        ("data.link-outside", "links outside the folder; copy the files, or set data.follow_links=true"),
        ("data.image-unreadable", ""),
        ("data.file-unreadable", ""),
        ("data.image-hidden", "is hidden; move it to a visible folder"),
        ("data.image-system", "is in a folder of the system; move it to another folder"),
        ("data.image-run", "was written by a run inside the folder; pass another folder"),
        ("data.repeats-zero", "is in a folder with zero repeats; rename the folder"),
        ("data.image-mask", "is a mask; pass the folder with the images"),
    ):
        if noticed[key]:
            name, detail = next(iter(noticed[key].items()))
            return DataError(f"{message}: {name} {' '.join(filter(None, (detail, remedy)))}", key=key)
    if any(is_image(name) and is_heldout(name) for name in files):
        message += f"; all images are in folders named {HELDOUT}, which are never trained on; move some out"
        return DataError(message, key="data.heldout")
    near = _nearest_images(root.absolute())
    remedy = f"the nearest folder with images is {near}" if near else "pass a folder with images"
    return DataError(f"{message}; {remedy}", key="data.no-images")


def _nearest_images(root: Path) -> Path | None:
    """Searches a few levels up, and below each a few levels down, but never a whole disk."""
    for above in root.parents[:SEARCH_UP]:
        for folder, inner, names in islice(os.walk(above), MAX_SEARCHED):
            depth = len(Path(folder).relative_to(above).parts)
            inner[:] = sorted(name for name in inner if not _is_ignored(name)) if depth < SEARCH_DOWN else []
            if Path(folder) != root and any(map(is_image, names)):
                return Path(folder)
    return None
