"""What stands for an image folder: a zip archive, or the id of a data set on the Hugging Face Hub."""

from __future__ import annotations

import hashlib
import re
import shutil
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from tempfile import mkdtemp

import huggingface_hub
from huggingface_hub.errors import HFValidationError

from sdlora.data.caption_files import METADATA_FILES, SIDECAR_SUFFIXES
from sdlora.data.folders import is_image
from sdlora.data.images import IMAGE_SUFFIXES
from sdlora.errors import DataError, one_line, shorten
from sdlora.writing import cache_folder

# In the cache folder.
ARCHIVES = "archives"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}")
# A zip archive may unpack to much more than its size.
MAX_FILES, MAX_FILE_BYTES, MAX_TOTAL_BYTES = 100_000, 2**30, 2**36
CHUNK = 2**20
Entry = tuple[zipfile.ZipInfo, str]
DAMAGED = (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, ValueError)


def open_source(source: str | Path) -> Path:
    """The image folder: `source` itself, an archive's in the cache, or a data set's of the hub.

    Raises:
        DataError: If an archive is damaged, hostile or too large, or a data set cannot be downloaded.
    """
    path = Path(source).expanduser()
    if path.suffix.lower() == ".zip" and path.is_file():
        return unpack(path, _is_of_images)
    # A name in a folder that exists is a mistyped path.
    name = path.as_posix()
    if HUB_ID.fullmatch(name) and not path.parent.exists():
        return _download(name)
    return path


def unpack(archive: Path, is_used: Callable[[PurePosixPath], bool], kind: str = "") -> Path:
    """Unpacks files into the cache, once for each version of an archive and kind of files.

    Raises:
        DataError: If the archive is damaged, hostile or too large.
    """
    status = archive.stat()
    # Named as the archive, so that names such as kohya's `10_ink` count.
    target = _place(f"{archive.resolve()}:{status.st_size}:{status.st_mtime_ns}{kind}", archive.stem)
    if target.is_dir():
        return target
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(mkdtemp(dir=target.parent))
        with zipfile.ZipFile(archive) as opened:
            _write_entries(list(_usable(opened, archive, is_used)), opened, archive, temporary)
        temporary.replace(target)
    except (*DAMAGED, RuntimeError) as error:
        problem = f"{archive} cannot be unpacked ({one_line(str(error))})"
        raise DataError(f"{problem}; unpack it yourself, and pass the folder", key="data.archive") from None
    except OSError as error:
        if not target.is_dir():  # Else another process was faster.
            problem = f"{archive} cannot be unpacked into {target.parent} ({error.strerror})"
            raise DataError(f"{problem}; set SDLORA_CACHE to another folder", key="data.archive") from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return target


def _place(version: str, name: str) -> Path:
    return cache_folder() / ARCHIVES / hashlib.sha256(version.encode()).hexdigest()[:16] / name


def _write_entries(entries: Sequence[Entry], opened: zipfile.ZipFile, archive: Path, folder: Path) -> None:
    """Writes entries of an archive into an empty folder; nothing outside it."""
    if len(entries) > MAX_FILES:
        raise _too_large(archive, f"more than {MAX_FILES:,} files")
    total = 0
    for entry, name in entries:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        size = 0
        with opened.open(entry) as read, file.open("xb") as write:
            while data := read.read(CHUNK):  # The size in the header may be wrong.
                size, total = size + len(data), total + len(data)
                if size > MAX_FILE_BYTES or total > MAX_TOTAL_BYTES:
                    limit = MAX_FILE_BYTES if size > MAX_FILE_BYTES else MAX_TOTAL_BYTES
                    raise _too_large(archive, f"{shorten(name)}: more than {limit // 2**30} GiB")
                write.write(data)


def _is_of_images(path: PurePosixPath) -> bool:
    is_text = path.name in METADATA_FILES or path.suffix.lower() in SIDECAR_SUFFIXES
    return is_text or is_image(path.as_posix())


def _usable(
    opened: zipfile.ZipFile, archive: Path, is_used: Callable[[PurePosixPath], bool]
) -> Iterator[Entry]:
    """The entries that are used, and their names; raises a DataError for one that leads outside."""
    for entry in opened.infolist():
        name, path = entry.filename, PurePosixPath(entry.filename)
        if path.is_absolute() or ".." in path.parts or re.search(r"[\\:\x00-\x1f]", name):
            problem = f"{archive} has a file that would be written elsewhere: {shorten(one_line(name))}"
            raise DataError(f"{problem}; do not use it", key="data.archive-path")
        is_link = stat.S_ISLNK(entry.external_attr >> 16)
        if is_used(path) and not is_link and not entry.is_dir():
            yield entry, name


def _too_large(archive: Path, what: str) -> DataError:
    problem = f"{archive} is too large to unpack ({what})"
    return DataError(f"{problem}; unpack it yourself, and pass the folder", key="data.archive-size")


def _download(name: str) -> Path:
    """The images and captions of a data set, fetched into the cache as huggingface_hub is set up to."""
    endings = [f"*{ending}" for ending in (*IMAGE_SUFFIXES, *SIDECAR_SUFFIXES, *METADATA_FILES)]
    wanted = [*endings, *map(str.upper, endings)]
    folder = _place(name, PurePosixPath(name).name)
    try:
        huggingface_hub.snapshot_download(name, repo_type="dataset", local_dir=folder, allow_patterns=wanted)
    except (OSError, HFValidationError) as error:  # Every error of the hub is an OSError.
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        problem = f"image folder {name} does not exist, nor can a data set of the hub be read"
        raise DataError(f"{problem} ({shorten(reason)}); check it", key="data.folder-missing") from None
    if not any(is_image(file.name) for file in folder.rglob("*")):
        problem = f"data set {name} of the hub has no image files (they may be inside Parquet files)"
        raise DataError(f"{problem}; save them as a folder of images", key="data.no-images")
    return folder
