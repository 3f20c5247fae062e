"""Finds the caption of each image: in files beside it, or in metadata of its folder and those above."""

from __future__ import annotations

import codecs
import csv
import io
import posixpath
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from sdlora.data.records import Finding, count_of
from sdlora.errors import join_names, shorten, unfit_letters
from sdlora.reading import UnfitFileError, parse_json, read_bytes

SIDECAR_SUFFIXES = (".txt", ".caption")
METADATA_FILES = ("metadata.jsonl", "metadata.csv")
CAPTION_COLUMNS = ("text", "caption", "prompt")
# A base takes some hundred words; a file of this size is something else.
MAX_CAPTION_BYTES = 100_000
MAX_METADATA_BYTES = 32_000_000
MAX_LINES = 500_000
MAX_LISTED = 1000
_PAPERS = ("readme", "license", "licence", "attribution", "notice", "credits", "copying", "authors")


@dataclass(frozen=True, slots=True)
class Caption:
    """A caption as written, and where it was found."""

    text: str
    source: str


@dataclass
class _Search:
    """What has been found so far: candidates for each image, best first."""

    root: Path
    candidates: dict[str, list[Caption]] = field(default_factory=lambda: defaultdict(list))
    findings: list[Finding] = field(default_factory=list)
    unread: dict[str, str] = field(default_factory=dict)
    """Files that cannot be read, and why."""
    guessed: list[str] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)


def decode_text(data: bytes) -> tuple[str, str]:
    """Text and the encoding it was read in: UTF-8 with or without a mark, UTF-16, else cp1252."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", errors="replace"), "utf-16"
    if b"\0" in data:
        # Without a mark, the halves that are zero in Latin text tell the byte order.
        encoding = "utf-16-le" if data[1::2].count(0) >= data[::2].count(0) else "utf-16-be"
        return data.decode(encoding, errors="replace"), encoding
    try:
        return data.decode("utf-8-sig"), "utf-8"
    except UnicodeDecodeError:
        return data.decode("cp1252", errors="replace"), "cp1252"


def find_captions(
    root: Path, files: Iterable[str], images: Sequence[str]
) -> tuple[dict[str, Caption], list[Finding]]:
    """Looks for captions beside the images and in metadata files above them.

    The order of trust is `.txt`, `.caption`, then metadata of the nearest folder, `.jsonl` before `.csv`.

    Args:
        root: The image folder.
        files: All files in it, relative, with forward slashes.
        images: Those that are images.

    Returns:
        The caption of each image that has one, and what was noticed.
    """
    search = _Search(root)
    names = sorted(files)
    _read_sidecars(search, names, images)
    # Deeper folders first: the nearest metadata file wins.
    metadata = [name for name in names if PurePosixPath(name).name in METADATA_FILES]
    metadata.sort(key=lambda name: (-name.count("/"), METADATA_FILES.index(PurePosixPath(name).name), name))
    known = {_normalise(name): name for name in images}
    for name in metadata:
        _read_metadata(search, name, known)
    search.findings += _report_unread(search.unread)
    if search.guessed:
        search.findings.append(
            Finding(
                "notice",
                f"{count_of(len(search.guessed), 'file')} not in UTF-8, read as Windows text (cp1252): "
                f"{join_names(search.guessed)}; save as UTF-8 if letters look wrong",
                tuple(search.guessed),
            )
        )
    search.findings += _report_orphans(search.orphans)
    search.findings += _report_conflicts(search.candidates)
    return {name: found[0] for name, found in search.candidates.items()}, search.findings


def _normalise(name: str) -> str:
    """One spelling for one name: some systems store accents apart from their letters."""
    return unicodedata.normalize("NFC", name)


def _clean(value: Any) -> str:
    """One line of text, without what no tokenizer or file can take; empty for what is no text."""
    if not isinstance(value, str | int | float):
        return ""
    words = " ".join(str(value).replace("\ufeff", "").split())
    unfit = unfit_letters(words)
    return " ".join("".join(c for c in words if c not in unfit).split()) if unfit else words


def _read_text(search: _Search, name: str, max_bytes: int) -> str:
    try:
        text, encoding = decode_text(read_bytes(search.root / name, max_bytes))
    except (OSError, UnfitFileError) as error:
        search.unread[name] = f"({error.strerror})" if isinstance(error, OSError) else str(error)
        return ""
    if encoding == "cp1252":
        search.guessed.append(name)
    return text


def _read_sidecars(search: _Search, names: Sequence[str], images: Sequence[str]) -> None:
    """`a.txt` and `a.caption` belong to `a.png`; `a.png.txt` too."""
    owners: dict[str, list[str]] = defaultdict(list)
    for image in images:
        owners[_normalise(str(PurePosixPath(image).with_suffix("")))].append(image)
        owners[_normalise(image)].append(image)
    folders = {PurePosixPath(image).parent for image in images}
    for suffix in SIDECAR_SUFFIXES:
        for name in names:
            path = PurePosixPath(name)
            if path.suffix.lower() != suffix:
                continue
            owned = owners.get(_normalise(name[: -len(suffix)]), [])
            text = _clean(_read_text(search, name, MAX_CAPTION_BYTES)) if owned else ""
            for image in owned:
                if text:
                    search.candidates[image].append(Caption(text, suffix))
            if not owned and path.parent in folders and not path.stem.lower().startswith(_PAPERS):
                search.orphans.append(name)


def _read_metadata(search: _Search, name: str, known: Mapping[str, str]) -> None:
    """Rows of a metadata file name images relative to the file."""
    path = PurePosixPath(name)
    missing: list[str] = []
    long: dict[str, str] = {}
    rows = captions = 0
    columns: dict[str, None] = {}
    for row in _read_rows(search, name):
        rows += 1
        if len(columns) < MAX_LISTED:
            columns.update(dict.fromkeys(map(str, row)))
        target = _clean(row.get("file_name"))
        if not target:
            continue
        column = next((key for key in CAPTION_COLUMNS if key in row), None)
        captions += column is not None
        image = _find_image(str(path.parent), str(row["file_name"]).strip(), known)
        if image is None:
            missing.append(shorten(target))
        elif column is not None and (text := _clean(row[column])):
            if len(text) > MAX_CAPTION_BYTES:
                long[image] = f"{image} ({len(text):,})"
            else:
                search.candidates[image].append(Caption(text, path.name))
    if rows and ("file_name" not in columns or not captions):
        wanted = "file_name" if "file_name" not in columns else "text, caption or prompt"
        found = join_names(map(shorten, columns))
        message = f"{name} has no column {wanted} (it has {found}); name the column so"
        search.findings.append(Finding("error", message, (name,)))
    if long:
        message = f"{name} has {count_of(len(long), 'caption')} of more than {MAX_CAPTION_BYTES:,} letters: "
        message += f"{join_names(long.values())}; shorten them"
        search.findings.append(Finding("error", message, tuple(long)))
    if missing:
        message = f"{name} names images that are not there ({len(missing)}): "
        search.findings.append(Finding("warning", message + join_names(missing), tuple(missing)))


def _read_rows(search: _Search, name: str) -> Iterator[dict[str, Any]]:
    text = _read_text(search, name, MAX_METADATA_BYTES).removeprefix("\ufeff")
    lines = max(text.count("\n"), text.count("\r"))
    if lines > MAX_LINES:
        message = f"{name} has {lines:,} lines; at most {MAX_LINES:,} are read, so split the folder"
        search.findings.append(Finding("error", message, (name,)))
        return
    if name.endswith(".csv"):
        try:
            yield from csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True)
        except csv.Error as error:
            search.findings.append(Finding("error", f"{name} is not a CSV table: {error}", (name,)))
        return
    bad: list[str] = []
    # Not splitlines: JSON text may hold line separators of other kinds.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except UnfitFileError:
            row = None
        if isinstance(row, dict):
            yield row
        else:
            bad.append(f"line {number}")
    if bad:
        message = f"{name} must hold one JSON object a line; correct {join_names(bad)}"
        search.findings.append(Finding("error", message, (name,)))


def _find_image(folder: str, target: str, known: Mapping[str, str]) -> str | None:
    for spelling in (target, target.replace("\\", "/")):
        image = known.get(_normalise(posixpath.normpath(posixpath.join(folder, spelling))))
        if image is not None:
            return image
    return None


def _report_unread(reasons: Mapping[str, str]) -> list[Finding]:
    if not reasons:
        return []
    listed = join_names(f"{name} {reason}" for name, reason in reasons.items())
    message = f"{count_of(len(reasons), 'caption file')} that cannot be read: {listed}"
    return [Finding("error", f"{message}; mend them, or move them away", tuple(reasons))]


def _report_orphans(names: Sequence[str]) -> list[Finding]:
    if not names:
        return []
    message = f"{count_of(len(names), 'caption file')} without an image of that name: {join_names(names)}"
    return [Finding("notice", message, tuple(names))]


def _report_conflicts(candidates: Mapping[str, Sequence[Caption]]) -> list[Finding]:
    """One notice for each pair of places that say different things."""
    conflicts: dict[tuple[str, str], list[str]] = defaultdict(list)
    for image, found in sorted(candidates.items()):
        for other in dict.fromkeys(caption.source for caption in found[1:] if caption.text != found[0].text):
            conflicts[found[0].source, other].append(image)
    findings = []
    for (winner, loser), images in conflicts.items():
        if winner == loser:
            message = f"{winner} has several captions for {count_of(len(images), 'image')}; the first wins"
        else:
            message = f"{winner} and {loser} differ for {count_of(len(images), 'image')}; {winner} wins"
        findings.append(Finding("notice", f"{message}: {join_names(images)}", tuple(images)))
    return findings
