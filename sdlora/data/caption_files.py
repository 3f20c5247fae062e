"""Finds the caption of each image: in files beside it, or in metadata of its folder and those above."""

from __future__ import annotations

import codecs
import csv
import io
import posixpath
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from sdlora.data.records import Noticed
from sdlora.errors import join_names, shorten, unfit_letters
from sdlora.reading import UnfitFileError, parse_json, read_bytes

SIDECAR_SUFFIXES = (".txt", ".caption")
METADATA_FILES = ("metadata.jsonl", "metadata.csv")
CAPTION_COLUMNS = ("text", "caption", "prompt")
# A base takes about a hundred words; a larger file is not a caption.
MAX_CAPTION_BYTES = 100_000
MAX_METADATA_BYTES = 32_000_000
MAX_LINES = 500_000
MAX_LISTED = 1000
_DOCUMENTS = ("readme", "license", "licence", "attribution", "notice", "credits", "copying", "authors")


class Caption(NamedTuple):
    """A caption as written, and the kind of file it comes from."""

    text: str
    source: str


@dataclass
class _Search:
    """Captions found so far for each image, best first."""

    root: Path
    noticed: Noticed
    candidates: dict[str, list[Caption]] = field(default_factory=lambda: defaultdict(list))


def decode_text(data: bytes) -> tuple[str, str]:
    """Returns text and encoding: UTF-8 with or without a byte order mark, UTF-16, else cp1252."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", errors="replace"), "utf-16"
    if b"\0" in data:
        # Without a mark, the zero halves of Latin text show the byte order.
        encoding = "utf-16-le" if data[1::2].count(0) >= data[::2].count(0) else "utf-16-be"
        return data.decode(encoding, errors="replace"), encoding
    try:
        return data.decode("utf-8-sig"), "utf-8"
    except UnicodeDecodeError:
        return data.decode("cp1252", errors="replace"), "cp1252"


def find_captions(
    root: Path, files: Sequence[str], images: Sequence[str], noticed: Noticed
) -> dict[str, Caption]:
    """Looks for captions beside the images and in metadata files above them.

    The order of trust is `.txt`, `.caption`, then metadata of the nearest folder, `.jsonl` before `.csv`.
    """
    search = _Search(root, noticed)
    names = sorted(files)
    _read_sidecars(search, names, images)
    # Deeper folders first: the nearest metadata file wins.
    metadata = [name for name in names if PurePosixPath(name).name in METADATA_FILES]
    metadata.sort(key=lambda name: (-name.count("/"), METADATA_FILES.index(PurePosixPath(name).name), name))
    known = {_normalise(name): name for name in images}
    for name in metadata:
        _read_metadata(search, name, known)
    for image, (first, *others) in sorted(search.candidates.items()):
        loser = next((caption.source for caption in others if caption.text != first.text), "")
        if loser:
            rule = f"{first.source} wins over {loser}" if loser != first.source else f"first of {loser} wins"
            noticed["data.captions-differ"][image] = f"({rule})"
    return {name: found[0] for name, found in search.candidates.items()}


def _normalise(name: str) -> str:
    """One spelling for each name: some systems store accents apart from their letters."""
    return unicodedata.normalize("NFC", name)


def _clean(value: Any) -> str:
    """One line without unprintable characters; empty for a value that is not text."""
    if not isinstance(value, str | int | float):
        return ""
    words = " ".join(str(value).replace("\ufeff", "").split())
    unfit = unfit_letters(words)
    return " ".join("".join(c for c in words if c not in unfit).split()) if unfit else words


def _read_text(search: _Search, name: str, max_bytes: int) -> str:
    try:
        text, encoding = decode_text(read_bytes(search.root / name, max_bytes))
    except (OSError, UnfitFileError) as error:
        reason = f"({error.strerror})" if isinstance(error, OSError) else str(error)
        search.noticed["data.caption-unreadable"][name] = reason
        return ""
    if encoding == "cp1252":
        search.noticed["data.caption-encoding"][name] = ""
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
            if not owned and path.parent in folders and not path.stem.lower().startswith(_DOCUMENTS):
                search.noticed["data.caption-unmatched"][name] = ""


def _read_metadata(search: _Search, name: str, known: Mapping[str, str]) -> None:
    """Rows of a metadata file name images relative to the file."""
    path, noticed = PurePosixPath(name), search.noticed
    has_rows = has_captions = False
    columns: dict[str, None] = {}
    for row in _read_rows(search, name):
        has_rows = True
        if len(columns) < MAX_LISTED:
            columns |= dict.fromkeys(map(str, row))
        if not (target := _clean(row.get("file_name"))):
            continue
        column = next((key for key in CAPTION_COLUMNS if key in row), None)
        has_captions |= column is not None
        image = _find_image(str(path.parent), str(row["file_name"]).strip(), known)
        if image is None:
            noticed["data.row-unmatched"][shorten(target)] = f"({name})"
        elif column is not None and (text := _clean(row[column])):
            if len(text) > MAX_CAPTION_BYTES:
                length = f"{len(text):,} characters, at most {MAX_CAPTION_BYTES:,}"
                noticed["data.caption-long"][image] = f"({length}; {name})"
            else:
                search.candidates[image].append(Caption(text, path.name))
    if has_rows and ("file_name" not in columns or not has_captions):
        wanted = "file_name" if "file_name" not in columns else "text, caption or prompt"
        found = join_names(map(shorten, columns))
        noticed["data.table-columns"][name] = f"has no column {wanted} (found: {found})"


def _read_rows(search: _Search, name: str) -> Iterator[dict[str, Any]]:
    text = _read_text(search, name, MAX_METADATA_BYTES).removeprefix("\ufeff")
    lines = max(text.count("\n"), text.count("\r"))
    if lines > MAX_LINES:
        search.noticed["data.table-lines"][name] = f"has {lines:,} lines, at most {MAX_LINES:,} are read"
        return
    if name.endswith(".csv"):
        try:
            yield from csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True)
        except csv.Error as error:
            search.noticed["data.table-csv"][name] = f"is not a CSV table: {error}"
        return
    bad: list[str] = []
    # Not splitlines: JSON text may hold line separators of other kinds.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        row = None
        with suppress(UnfitFileError):
            row = parse_json(line)
        if isinstance(row, dict):
            yield row
        else:
            bad.append(f"line {number}")
    if bad:
        search.noticed["data.table-json"][name] = f"has lines that are not JSON objects: {join_names(bad)}"


def _find_image(folder: str, target: str, known: Mapping[str, str]) -> str | None:
    paths = (posixpath.join(folder, spelling) for spelling in (target, target.replace("\\", "/")))
    names = (_normalise(posixpath.normpath(path)) for path in paths)
    return next((known[name] for name in names if name in known), None)
