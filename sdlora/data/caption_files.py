"""Finds the caption of each image: in files beside it, or in metadata of its folder and those above."""

from __future__ import annotations

import codecs
import csv
import io
import posixpath
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from sdlora.config import DataSection
from sdlora.data.records import Noticed
from sdlora.errors import join_names, shorten, unfit_letters
from sdlora.reading import UnfitFileError, parse_json, read_bytes

SIDECAR_SUFFIXES = (".txt", ".caption")
METADATA_FILES = ("metadata.jsonl", "metadata.csv")
# Files that may be such a table under another name.
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json1", ".ndjson", ".parquet", ".xlsx")
TABLE_STEMS = ("metadata", "captions", "meta_cap", "meta_lat")
DELIMITERS = ",;\t|"
CAPTION_COLUMNS = ("text", "caption", "prompt")
# A base takes about a hundred words; a larger file is not a caption.
MAX_CAPTION_BYTES = 100_000
MAX_METADATA_BYTES = 32_000_000
MAX_LINES = 500_000
MAX_LISTED = 1000
# For each encoding of East Asia: its everyday characters, and those of them that no longer text is without.
_ENCODINGS = {
    "cp932": (rb"\x81[\x40-\xac]|[\x82\x83\x88-\x97][\x40-\xfc]", rb""),
    "gb18030": (rb"[\xa1\xa3\xb0-\xd7][\xa1-\xfe]", rb"[\xc9-\xd7]."),
    "big5": (rb"[\xa1-\xc6][\x40-\xfe]", rb".[\x40-\x7e]"),
    "cp949": (rb"[\xa1\xa3\xb0-\xc8][\xa1-\xfe]", rb""),
    "euc_jp": (rb"[\xa1\xa3-\xa5\xb0-\xcf][\xa1-\xfe]", rb"[\xa4\xa5]."),
}
_LONG_TEXT = 6
_CLEAR, _MARGIN = 0.75, 0.1
# What cp1252 makes of other encodings: letters without a word, symbols beside letters.
_LETTER = "[À-ÖØ-öø-ÿŒœŠšŽžŸ]"
_NOT_LATIN = re.compile(
    rf"[^\x00-\x7f\xa0]{{4}}|{_LETTER}{{3}}|(?<![A-Za-z]){_LETTER}{{2}}(?![A-Za-z])"
    rf"|[¡-¶¸-¿ƒˆ˜†‡‰€]{_LETTER}(?<![¡¿«]{_LETTER})|{_LETTER}[¡-¨ª¬-¶¸º¼-¾¿ƒˆ˜†‡‰€]"
    r"|[¢-¶¸-º¼-¾]{2}|[A-Za-z][¡-©¬-±´µ¶¸¼-¿ƒˆ˜†‡‰€][A-Za-z]"
)
_DOCUMENTS = ("readme", "license", "licence", "attribution", "notice", "credits", "copying", "authors")


class Caption(NamedTuple):
    """A caption as written, the kind of file it comes from, and further captions of the same image."""

    text: str
    source: str
    others: tuple[str, ...] = ()


@dataclass
class _Search:
    """Captions found so far for each image, best first."""

    root: Path
    settings: DataSection
    noticed: Noticed
    names: Sequence[str]
    candidates: dict[str, list[Caption]] = field(default_factory=lambda: defaultdict(list))

    @cached_property
    def encoding(self) -> str:
        """The encoding of the captions that are neither Unicode nor Latin text, all of them together."""
        found = []
        for name in self.names:
            if PurePosixPath(name).suffix.lower() in SIDECAR_SUFFIXES or name.endswith(METADATA_FILES):
                with suppress(OSError, UnfitFileError):
                    data = read_bytes(self.root / name, MAX_METADATA_BYTES)
                    if decode_text(data)[1] == "cp1252" and not is_latin(data):
                        found.append(data)
        return guess_encoding(found)


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


def is_latin(data: bytes) -> bool:
    """Whether bytes read as cp1252 look like Latin text."""
    try:
        return _NOT_LATIN.search(data.decode("cp1252")) is None
    except UnicodeDecodeError:
        return False


def guess_encoding(texts: Iterable[bytes]) -> str:
    """The encoding of East Asia that all texts of a folder are in, or empty if that is not clear.

    Captions are too short for statistics of a language; the share of everyday characters, over all captions,
    tells the encodings apart.
    """
    data, scores = b"\n".join(texts), {}
    for encoding, (common, telling) in _ENCODINGS.items():
        with suppress(UnicodeDecodeError):
            letters = Counter(letter for letter in data.decode(encoding) if letter > "\x7f")
            wide = {letter.encode(encoding): number for letter, number in letters.items()}
            total = max(1, letters.total())
            usual = sum(number for letter, number in wide.items() if re.fullmatch(common, letter, re.DOTALL))
            told = any(re.match(telling, letter, re.DOTALL) for letter in wide)
            scores[encoding] = usual / total if told or total < _LONG_TEXT else usual / total / 2
    ranked = sorted(scores, key=lambda encoding: -scores[encoding])
    if not ranked or scores[ranked[0]] < _CLEAR:
        return ""
    is_clear = len(ranked) == 1 or scores[ranked[0]] - scores[ranked[1]] >= _MARGIN
    return ranked[0] if is_clear else ""


def find_captions(
    root: Path, files: Sequence[str], images: Sequence[str], settings: DataSection, noticed: Noticed
) -> dict[str, Caption]:
    """Looks for captions beside the images and in metadata files above them.

    The order of trust is `.txt`, `.caption`, then metadata of the nearest folder, `.jsonl` before `.csv`.
    """
    names = sorted(files)
    search = _Search(root, settings, noticed, names)
    _read_sidecars(search, names, images)
    for name in names:
        path = PurePosixPath(name.lower())
        is_table = path.suffix in TABLE_SUFFIXES or (path.suffix == ".json" and path.stem in TABLE_STEMS)
        is_read = PurePosixPath(name).name in METADATA_FILES or path.stem.startswith(_DOCUMENTS)
        if is_table and not is_read:
            noticed["data.table-name"][name] = ""
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


def _clean_all(values: Sequence[Any]) -> list[str]:
    return list(dict.fromkeys(text for text in map(_clean, values) if text))


def _listed(value: Any, settings: DataSection) -> Sequence[Any]:
    """The captions of a metadata row, with `data.several_captions` those of a list or of the lines."""
    if settings.several_captions and isinstance(value, list):
        return value[:MAX_LISTED]
    return value.splitlines() if settings.several_captions and isinstance(value, str) else [value]


def _read_text(search: _Search, name: str, max_bytes: int) -> str:
    try:
        data = read_bytes(search.root / name, max_bytes)
    except (OSError, UnfitFileError) as error:
        reason = f"({error.strerror})" if isinstance(error, OSError) else str(error)
        search.noticed["data.caption-unreadable"][name] = reason
        return ""
    text, encoding = decode_text(data)
    if encoding != "cp1252":
        return text
    given = search.settings.caption_encoding
    if search.settings.rules > 1 and (given or not is_latin(data)):
        encoding = given or search.encoding
        try:
            text = data.decode(encoding or "utf-8")  # which it is not
        except UnicodeDecodeError:
            search.noticed["data.caption-undecodable"][name] = f"(not {encoding})" if encoding else ""
            return ""
    if not given:
        search.noticed["data.caption-encoding"][name] = f"({encoding})"
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
            text = _read_text(search, name, MAX_CAPTION_BYTES) if owned else ""
            found = _clean_all(text.splitlines() if search.settings.several_captions else [text])
            refused = search.noticed["data.caption-unreadable"], search.noticed["data.caption-undecodable"]
            if owned and not found and not any(name in names for names in refused):
                search.noticed["data.caption-empty"][name] = ""
            for image in owned:
                if found:
                    search.candidates[image].append(Caption(found[0], suffix, tuple(found[1:])))
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
            columns |= dict.fromkeys(key for key in row if isinstance(key, str))
        if not (target := _clean(row.get("file_name"))):
            continue
        column = next((key for key in CAPTION_COLUMNS if key in row), None)
        has_captions |= column is not None
        image = _find_image(str(path.parent), str(row["file_name"]).strip(), known)
        if image is None:
            noticed["data.row-unmatched"][shorten(target)] = f"({name})"
        elif column is not None and (found := _clean_all(_listed(row[column], search.settings))):
            if (longest := max(map(len, found))) > MAX_CAPTION_BYTES:
                length = f"{longest:,} characters, at most {MAX_CAPTION_BYTES:,}"
                noticed["data.caption-long"][image] = f"({length}; {name})"
            else:
                search.candidates[image].append(Caption(found[0], path.name, tuple(found[1:])))
    if has_rows and ("file_name" not in columns or not has_captions):
        wanted = "file_name" if "file_name" not in columns else "text, caption or prompt"
        listed = join_names(map(shorten, columns))
        noticed["data.table-columns"][name] = f"has no column {wanted} (found: {listed})"


def _read_rows(search: _Search, name: str) -> Iterator[dict[str, Any]]:
    text = _read_text(search, name, MAX_METADATA_BYTES).removeprefix("\ufeff")
    lines = max(text.count("\n"), text.count("\r"))
    if lines > MAX_LINES:
        search.noticed["data.table-lines"][name] = f"has {lines:,} lines, at most {MAX_LINES:,} are read"
        return
    if name.endswith(".csv"):
        header = text.lstrip().split("\n", 1)[0].replace('"', "")
        found = (mark for mark in DELIMITERS if "file_name" in map(str.strip, header.split(mark)))
        delimiter = next(found, ",") if search.settings.rules > 1 else ","
        try:
            yield from csv.DictReader(
                io.StringIO(text, newline=""), skipinitialspace=True, delimiter=delimiter
            )
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
