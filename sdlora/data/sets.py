"""Sets: folders of images with settings of their own, `[[data.sets]]`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from sdlora.config import DataSection, SetSection
from sdlora.data.records import ImageRecord, count_of
from sdlora.errors import DataError, shorten

NUMBERED = re.compile(r"[0-9]{1,9}_(.+)")


@dataclass(frozen=True)
class Sets:
    """The set and the settings of each image below a folder.

    Args:
        data: The settings of images outside all sets.
        inside: By folder relative to this one, with a slash at its end; the empty text is all of it.
    """

    data: DataSection
    inside: Mapping[str, SetSection]

    def find(self, name: str) -> SetSection | None:
        """The set of the deepest folder that holds an image."""
        return max(
            ((len(at), one) for at, one in self.inside.items() if name.startswith(at)), default=(0, None)
        )[1]

    def settings_of(self, name: str) -> DataSection:
        return self.data.of_set(self.find(name))

    def is_class(self, name: str) -> bool:
        one = self.find(name)
        return one is not None and one.is_class

    def default_caption(self, name: str) -> str:
        """The caption of an image without one: for a class image, X of its folder `N_X`, as kohya has it."""
        one = self.find(name)
        if one is None or one.default_caption or not one.is_class:
            return one.default_caption if one else ""
        found = (NUMBERED.fullmatch(folder) for folder in reversed(PurePosixPath(name).parts[:-1]))
        return next((match[1] for match in found if match), "")


def locate_sets(root: Path, settings: DataSection) -> tuple[Sets, list[tuple[Path, Sets]]]:
    """The sets inside the image folder, and those elsewhere with their folders.

    Raises:
        DataError: If a folder does not exist, or is the image folder itself.
    """
    inside: dict[str, SetSection] = {}
    outside: list[tuple[Path, Sets]] = []
    home = root.resolve()
    for one in settings.sets:
        folder = _find_folder(root, one)
        target = folder.resolve()
        if target == home:
            problem = f"data.sets: the folder {folder} is the image folder itself"
            raise DataError(f"{problem}; name a subfolder or another folder", key="data.sets")
        if target.is_relative_to(home):
            inside[f"{target.relative_to(home).as_posix()}/"] = one
        else:
            outside.append((folder, Sets(settings, {"": one})))
    return Sets(settings, inside), outside


def _find_folder(root: Path, one: SetSection) -> Path:
    for folder in (root / one.folder, Path(one.folder).expanduser()):
        with suppress(OSError):  # The name may be too long.
            if folder.is_dir():
                return folder
    problem = f"data.sets: the folder {shorten(one.folder)} does not exist in {root} or elsewhere"
    raise DataError(f"{problem}; check the path", key="data.sets")


def describe_sets(records: Iterable[ImageRecord]) -> str:
    """A line for the plan; empty if all images have the same settings."""
    kinds = Counter((record.is_class, record.trigger, record.weight) for record in records)
    if len(kinds) == 1 and next(iter(kinds))[0] is False:
        return ""
    parts = []
    for (is_class, trigger, weight), count in sorted(kinds.items()):
        words = [count_of(count, "class image" if is_class else "image")]
        words += [f"trigger {trigger!r}"] if trigger else []
        words += [f"weight {weight:g}"] if weight != 1 else []
        parts.append(", ".join(words))
    return f"sets: {'; '.join(parts)}"
