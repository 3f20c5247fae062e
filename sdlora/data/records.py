"""Types for an image folder: sizes, images with captions, findings, and the index of a folder."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from sdlora.errors import DataError, one_line

T = TypeVar("T")
Severity = Literal["error", "warning", "notice"]
# For each kind of finding, the names it is about, with a detail each; `data.findings` words them.
Noticed = defaultdict[str, dict[str, str]]
ALPHA = "alpha"


@dataclass(frozen=True, slots=True, order=True)
class Size:
    """Width and height in pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"

    @property
    def area(self) -> int:
        return self.width * self.height

    @property
    def aspect(self) -> float:
        return self.width / self.height


@dataclass(frozen=True, slots=True)
class Mask:
    """What to learn of an image: a file beside it, white where it counts, or its own alpha channel."""

    path: Path
    digest: str  # sha256 of the file, or `ALPHA`
    size: Size | None = None  # of a file

    @property
    def is_alpha(self) -> bool:
        return self.digest == ALPHA


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One image and its captions.

    Attributes:
        name: Path relative to the image folder, with forward slashes; unique in an index.
        digest: sha256 of the file's bytes, hexadecimal.
        size: As a viewer shows it, EXIF orientation applied.
        caption: The text with the trigger, for evaluation, prompts and metadata.
        caption_source: `.txt`, `.caption`, `metadata.jsonl`, `metadata.csv`, `trigger`, or empty.
        repeats: Samples per epoch.
        variants: Captions for training, unless there is only `caption`.
        mask: What of it to learn, with `data.masks`.
        trigger: That of its set; empty for class images.
        weight: Of its samples in the loss.
        is_class: A class (regularization) image: what the base knows, not the style.
    """

    path: Path
    name: str
    digest: str
    size: Size
    caption: str
    caption_source: str
    repeats: int = 1
    variants: tuple[str, ...] = ()
    mask: Mask | None = None
    trigger: str = ""
    weight: float = 1.0
    is_class: bool = False

    @property
    def captions(self) -> tuple[str, ...]:
        return self.variants or (self.caption,)

    @property
    def identity(self) -> tuple[str | int, ...]:
        """What training sees of it: digest, caption, repeats, and what differs from an image without sets."""
        mask = () if self.mask is None else (self.mask.digest,)
        weight = () if self.weight == 1 else (str(self.weight),)
        return (self.digest, self.caption, self.repeats, *mask, *weight)


@dataclass(frozen=True, slots=True)
class Finding:
    """A result of preflight; errors stop a run. Keys, such as `data.copies`, are stable."""

    severity: Severity
    message: str
    names: tuple[str, ...] = ()
    key: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "message", one_line(self.message))


@dataclass(frozen=True, slots=True)
class DatasetIndex:
    """Result of scanning an image folder: training and held-out images by name, and input for findings."""

    root: Path
    records: tuple[ImageRecord, ...]
    heldout: tuple[ImageRecord, ...]
    noticed: Noticed

    @property
    def styled(self) -> tuple[ImageRecord, ...]:
        """The training images that show the style, without class images."""
        return tuple(record for record in self.records if not record.is_class)

    @property
    def num_captions(self) -> int:
        return len({caption for record in self.records for caption in record.captions})

    @property
    def digest(self) -> str:
        """sha256 of the training data, independent of file names."""
        rows = sorted(record.identity for record in self.records)
        return hashlib.sha256(json.dumps(rows, ensure_ascii=True).encode("ascii")).hexdigest()


def count_of(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def raise_errors(findings: Sequence[Finding]) -> None:
    """Raises one DataError for all findings that are errors, with a line and a key for each."""
    if errors := [finding for finding in findings if finding.severity == "error"]:
        if any(finding.key.startswith("data.captions-") for finding in errors):
            # They may be in a table whose name is not known.
            errors += [finding for finding in findings if finding.key == "data.table-name"]
        raised = DataError("\n".join(finding.message for finding in errors))
        raised.keys = tuple(finding.key for finding in errors)
        raise raised


def spread(items: Sequence[T], count: int) -> list[T]:
    """Up to `count` of the items, evenly spaced; the first alone for 1."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / max(count - 1, 1))] for i in range(count)]
