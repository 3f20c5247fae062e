"""Writes caption files for images that have none; what a person wrote is never changed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from PIL import Image

from sdlora.config import DataSection
from sdlora.data.caption_files import find_captions
from sdlora.data.folders import check_folder, is_image, list_usable, no_images_error
from sdlora.data.images import UnreadableImageError, load_image
from sdlora.data.repairs import strip_style
from sdlora.writing import write_text


def find_uncaptioned(root: Path, settings: DataSection) -> tuple[list[str], int]:
    """Names of the images without a caption, held-out ones too, and the number of all.

    Raises:
        DataError: If the folder is missing or has no images.
    """
    check_folder(root)
    noticed: defaultdict[str, dict[str, str]] = defaultdict(dict)
    files = list_usable(root, noticed, settings)
    images = [name for name in files if is_image(name)]
    if not images:
        raise no_images_error(root, files, noticed)
    captions = find_captions(root, files, images, settings, noticed)
    # A file that could not be read is a person's too.
    blocked = noticed["data.caption-undecodable"].keys() | noticed["data.caption-unreadable"].keys()
    missing = [name for name in images if name not in captions and _caption_file(name) not in blocked]
    return missing, len(images)


def write_skeletons(root: Path, names: Sequence[str]) -> int:
    """Makes empty caption files to fill in; returns how many."""
    files = [root / _caption_file(name) for name in names]
    new = [file for file in files if not file.exists()]
    for file in new:
        write_text(file, "")
    return len(new)


def write_captions(
    root: Path, names: Sequence[str], describe: Callable[[Image.Image], str], settings: DataSection
) -> Iterator[tuple[str, str]]:
    """Describes images and writes their caption files, one after the other; yields names and captions.

    Words that name a style are left out; the trigger, if there is one, comes first. A caption is empty, and
    not written, if the image cannot be read, there is nothing to say, or a person has written one meanwhile.
    """
    for name in names:
        file = root / _caption_file(name)
        try:
            image = load_image(root / name, settings.background)
        except UnreadableImageError:
            yield name, ""
            continue
        text = strip_style(describe(image))
        if file.exists() and file.read_text(encoding="utf-8", errors="replace").strip():
            text = ""
        if text:
            caption = ", ".join(filter(None, (settings.trigger, text)))
            write_text(file, caption + "\n")
        yield name, text


def _caption_file(name: str) -> str:
    return str(Path(name).with_suffix(".txt"))
