"""What is known about an image folder: sizes, records, findings, and the index that holds them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sdlora.errors import one_line

Severity = Literal["error", "warning", "notice"]


@dataclass(frozen=True, slots=True, order=True)
class Size:
    """Width and height in pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"

    @property
    def area(self) -> int:
        """Pixels in all."""
        return self.width * self.height

    @property
    def aspect(self) -> float:
        """Width over height."""
        return self.width / self.height


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One image and its caption.

    Attributes:
        path: The file.
        name: Its path relative to the image folder, with forward slashes; unique in an index.
        digest: sha256 of the file's bytes, hexadecimal.
        size: As a viewer shows it, EXIF orientation applied.
        caption: With the trigger placed; what evaluation, prompts and metadata use.
        caption_source: `.txt`, `.caption`, `metadata.jsonl`, `metadata.csv`, `trigger`, or empty.
        repeats: How often it appears in an epoch.
        variants: The captions that training draws from, where they are not `caption` alone.
    """

    path: Path
    name: str
    digest: str
    size: Size
    caption: str
    caption_source: str
    repeats: int = 1
    variants: tuple[str, ...] = ()

    @property
    def captions(self) -> tuple[str, ...]:
        """The captions that training draws from."""
        return self.variants or (self.caption,)


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that preflight saw: errors stop a run, warnings and notices are told.

    The message is one line, whatever the names in it hold.
    """

    severity: Severity
    message: str
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "message", one_line(self.message))


@dataclass(frozen=True, slots=True)
class DatasetIndex:
    """Everything that scanning an image folder found.

    Attributes:
        root: The image folder.
        records: The images to train on, by name.
        heldout: The images that are never trained on, by name.
        findings: What scanning noticed, errors included.
    """

    root: Path
    records: tuple[ImageRecord, ...]
    heldout: tuple[ImageRecord, ...]
    findings: tuple[Finding, ...]

    @property
    def num_captions(self) -> int:
        """Different captions that training draws from; each is encoded once."""
        return len({caption for record in self.records for caption in record.captions})

    @property
    def digest(self) -> str:
        """sha256 over what is trained on: (image digest, caption, repeats), in any order of files."""
        rows = sorted((record.digest, record.caption, record.repeats) for record in self.records)
        return hashlib.sha256(json.dumps(rows, ensure_ascii=True).encode("ascii")).hexdigest()


def count_of(number: int, noun: str) -> str:
    """`1 image`, `3 images`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
