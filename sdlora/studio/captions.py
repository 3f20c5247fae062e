"""An image folder as a data set, and its captions edited in place, with a journal that loses nothing.

A caption is written as `NAME.txt` beside its image, which wins over all other sources. The journal keeps the
bytes that each file had before, outside the image folder, so that every edit can be undone.
"""

from __future__ import annotations

import base64
import json
import os
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image, ImageDraw

from sdlora.config import DataSection, RunConfig, load_config
from sdlora.data.buckets import plan_buckets
from sdlora.data.caption_files import MAX_CAPTION_BYTES, find_captions
from sdlora.data.doctor import Checkup, check_images
from sdlora.data.folders import is_image, list_usable
from sdlora.data.images import load_image
from sdlora.data.records import ImageRecord, Noticed, Size
from sdlora.errors import DataError
from sdlora.models.info import inspect_base, with_base_defaults
from sdlora.reading import UnfitFileError, read_bytes
from sdlora.writing import append_lines, write_file

THUMBNAIL_PX = 240
_lock = threading.Lock()


class ImageFolder:
    """One image folder, seen with the settings of a run, or with the defaults.

    Args:
        path: The folder.
        journal: The file that keeps what edits replaced.
        config: Settings of a run on it.
    """

    def __init__(self, path: Path, journal: Path, config: RunConfig | None = None) -> None:
        self.path, self.journal = path, journal
        config = config or load_config(images=path)
        self.info = inspect_base(config.base, config.objective, config.data)
        self.config = with_base_defaults(config, self.info).model_copy(update={"images": str(path)})

    def check(self) -> Checkup:
        """Findings, and the bucket of every image; raises a DataError if there is nothing to train on."""
        return check_images(self.config, resolution=self.info.resolution, min_step=self.info.min_step)

    def captions(self) -> dict[str, str]:
        """Captions by image, one a line, however many of them the run reads; empty where there are none."""
        noticed: Noticed = defaultdict(dict)
        files = list_usable(self.path, noticed, self.config.data)
        images = sorted(name for name in files if is_image(name))
        settings = self.config.data.model_copy(update={"several_captions": True})
        found = find_captions(self.path, files, images, settings, noticed)
        return {
            name: "\n".join((found[name].text, *found[name].others)) if name in found else ""
            for name in images
        }

    def thumbnail(self, name: str) -> Image.Image:
        """An image at the size of a thumbnail, with what its crop removes dimmed."""
        image = load_image(self._image(name), self.config.data.background)
        record = ImageRecord(self.path / name, name, "", Size(*image.size), "", "")
        side, step = self.config.data.resolution or self.info.resolution, self.info.min_step
        plan = plan_buckets((), side, DataSection(), heldout=[record], min_step=step)
        crop = plan.crops[name][0]
        image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
        scale = image.width / crop.resized.width
        box = (crop.left, crop.top, crop.left + crop.size.width, crop.top + crop.size.height)
        shade = Image.new("L", image.size, 150)
        ImageDraw.Draw(shade).rectangle([round(side * scale) for side in box], 0)
        return Image.composite(Image.new("RGB", image.size, "#808088"), image, shade)

    def write(self, changes: Mapping[str, tuple[str, str]]) -> dict[str, str]:
        """Writes captions, all or none.

        Args:
            changes: By image, the caption that was seen and the new one.

        Returns:
            The new captions, by image.

        Raises:
            DataError: If a caption has changed since it was seen, is too long, belongs to two images, or
                cannot be written.
        """
        with _lock:
            current, entry = self.captions(), {}
            for name, (seen, text) in changes.items():
                if name not in current:
                    raise DataError(
                        f"there is no image {name} any more; reload the page", key="data.image-gone"
                    )
                if current[name] != seen:
                    problem = f"the caption of {name} has changed since this page was loaded; reload the page"
                    raise DataError(problem, key="caption.changed")
                if len(text.encode()) > MAX_CAPTION_BYTES:
                    raise DataError(f"the caption of {name} is too long", key="data.caption-long")
                file = self.path / self._caption_file(name, list(current))
                lines = filter(None, (" ".join(line.split()) for line in text.splitlines()))
                entry[name] = (file, _read(file), ("\n".join(lines) + "\n").encode())
            if entry:
                files = [
                    [file.relative_to(self.path).as_posix(), _encode(before), _encode(after)]
                    for file, before, after in entry.values()
                ]
                self._journal({"images": list(entry), "files": files})
                try:
                    _write_all(list(entry.values()))
                except DataError:
                    self._journal({"undo": True})
                    raise
            now = self.captions()
            return {name: now[name] for name in entry}

    def undo(self) -> tuple[dict[str, str], list[str]]:
        """Restores the files of the last edit, but for those that another program has changed since.

        Returns:
            The captions of the edit's images, and the names of the files that stay as they are.

        Raises:
            DataError: If there is nothing to undo, or a file cannot be written.
        """
        with _lock:
            edits = self._edits()
            if not edits:
                raise DataError("there is nothing to undo", key="caption.no-edit")
            last = edits[-1]
            files = [(self.path / file, _decode(old), _decode(new)) for file, old, new in last["files"]]
            changed = {file: not _has(file, after) for file, _, after in files}
            restored = [(file, after, before) for file, before, after in files if not changed[file]]
            _write_all(restored)
            try:
                self._journal({"undo": True})
            except DataError:
                _write_all([(file, before, after) for file, after, before in restored])
                raise
            now = self.captions()
            captions = {name: now[name] for name in last["images"] if name in now}
            return captions, [file.name for file in changed if changed[file]]

    @property
    def num_edits(self) -> int:
        """Edits that can be undone."""
        return len(self._edits())

    def _journal(self, entry: dict[str, Any]) -> None:
        try:
            append_lines(self.journal, [{"time": time.time(), **entry}])
        except OSError as error:
            problem = f"cannot write {self.journal} ({error.strerror}), so no caption was changed"
            raise DataError(problem, key="caption.unwritable") from None

    def _image(self, name: str) -> Path:
        path = Path(os.path.realpath(self.path / name.replace("\0", "")))
        if not (path.is_relative_to(self.path) and is_image(path.name) and path.is_file()):
            raise DataError(f"there is no image {name!r:.80}", key="data.image-gone")
        return path

    def _caption_file(self, name: str, images: list[str]) -> str:
        """The `.txt` file that wins for an image: the one that there is, else a new one."""
        path = PurePosixPath(name)
        stem = str(path.with_suffix(""))
        found = [file for file in (f"{name}.txt", f"{stem}.txt") if (self.path / file).is_file()]
        twins = [
            other for other in images if other != name and str(PurePosixPath(other).with_suffix("")) == stem
        ]
        chosen = min(found, default=f"{name}.txt" if twins else f"{stem}.txt")
        if twins and chosen != f"{name}.txt":
            problem = f"{chosen} is the caption of {name} and of {twins[0]}; rename one of them"
            raise DataError(problem, key="caption.shared")
        return chosen

    def _edits(self) -> list[dict[str, Any]]:
        """Edits that were not undone, the last one last."""
        edits: list[dict[str, Any]] = []
        for line in self.journal.read_bytes().splitlines() if self.journal.is_file() else ():
            with suppress(ValueError):
                entry = json.loads(line)
                if "undo" not in entry:
                    edits.append(entry)
                elif edits:
                    edits.pop()
        return edits


def _read(file: Path) -> bytes | None:
    if not file.exists():
        return None
    try:
        return read_bytes(file, MAX_CAPTION_BYTES)
    except (OSError, UnfitFileError) as error:
        problem = f"{file.name} {error}; no caption was changed, repair or remove that file"
        raise DataError(problem, key="caption.unreadable") from None


def _has(file: Path, data: bytes | None) -> bool:
    """Whether a file is as it was written; one that cannot be read is not."""
    with suppress(DataError):
        return _read(file) == data
    return False


def _write_all(changes: Sequence[tuple[Path, bytes | None, bytes | None]]) -> None:
    """Writes files, given as (file, bytes before, bytes after), all or none."""
    for number, (file, _, after) in enumerate(changes):
        try:
            _write(file, after)
        except OSError as error:
            for done, before, _ in changes[:number]:
                with suppress(OSError):
                    _write(done, before)
            problem = f"cannot write {file.name} ({error.strerror}); no caption was changed"
            raise DataError(problem, key="caption.unwritable") from None


def _write(file: Path, data: bytes | None) -> None:
    """Writes a file, or removes it if there was none."""
    if data is None:
        file.unlink(missing_ok=True)
    else:
        write_file(file, lambda temporary: temporary.write_bytes(data))


def _encode(data: bytes | None) -> str | None:
    return None if data is None else base64.b64encode(data).decode()


def _decode(text: str | None) -> bytes | None:
    return None if text is None else base64.b64decode(text)
