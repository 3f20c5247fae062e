"""Chooses the images that are never trained on: a folder, or a share drawn by digest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath

from sdlora.data.records import ImageRecord
from sdlora.errors import DataError, shorten

HELDOUT = "heldout"
AUTO_SHARE, AUTO_FROM, AUTO_LEAST = 0.1, 12, 2


def is_heldout(name: str) -> bool:
    """Whether a file is in a folder that is named `heldout`, at any depth."""
    return HELDOUT in PurePosixPath(name).parts[:-1]


def is_below(name: str, folders: str | None) -> bool:
    """Whether a file is in the held-out folder: HELDOUT stands for any folder of that name."""
    if folders is None:
        return False
    return is_heldout(name) if folders == HELDOUT else name.startswith(f"{folders}/")


def locate_heldout(root: Path, images: Iterable[str], value: float | str) -> tuple[str | None, Path | None]:
    """The held-out folder that `data.heldout` means.

    Returns:
        A folder inside the image folder (relative), or one elsewhere; neither where a share is asked for.

    Raises:
        DataError: If a folder is asked for that is not there.
    """
    if value == "auto":
        return (HELDOUT if any(map(is_heldout, images)) else None), None
    if not isinstance(value, str):
        return None, None
    for folder in (root / value, Path(value).expanduser()):
        is_folder = False
        with suppress(OSError):  # A name that is too long is none.
            is_folder = folder.is_dir()
        if is_folder:
            inside = _relative(folder, root)
            return (inside, None) if inside else (None, folder)
    raise DataError(
        f"data.heldout = {shorten(value)} is not a folder; give a folder, a share such as 0.1, or 0"
    )


def _relative(folder: Path, root: Path) -> str:
    try:
        inside = folder.resolve().relative_to(root.resolve()).as_posix()
    except ValueError:
        return ""
    if inside == ".":
        raise DataError(
            f"data.heldout = {folder} is the image folder itself; give another folder, a share or 0"
        )
    return inside


def hold_out_share(
    records: Sequence[ImageRecord], share: float | str, seed: int
) -> tuple[list[ImageRecord], list[ImageRecord]]:
    """Chooses by digest, evenly over the folders; copies of an image stay together."""
    images = {record.digest: record for record in records}
    number = _heldout_count(share, len(images))
    if not number:
        return list(records), []

    def draw(digest: str) -> tuple[str, str]:
        folder = str(PurePosixPath(images[digest].name).parent)
        return folder, hashlib.sha256(f"{seed}:heldout:{digest}".encode()).hexdigest()

    order = sorted(images, key=draw)
    chosen = {order[(2 * i + 1) * len(order) // (2 * number)] for i in range(number)}
    return (
        [record for record in records if record.digest not in chosen],
        [record for record in records if record.digest in chosen],
    )


def _heldout_count(share: float | str, images: int) -> int:
    if isinstance(share, str):
        return max(AUTO_LEAST, round(AUTO_SHARE * images)) if images >= AUTO_FROM else 0
    return min(images - 1, max(1, round(share * images))) if share > 0 and images else 0
