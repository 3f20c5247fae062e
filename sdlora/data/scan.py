"""Scans an image folder: reads every image and caption, and chooses the held-out images."""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import cache
from operator import attrgetter
from pathlib import Path, PurePosixPath

from sdlora.config import PLACEHOLDERS, WEIGHT, DataSection, RunConfig
from sdlora.data.buckets import BucketPlan, plan_buckets
from sdlora.data.caption_files import METADATA_FILES, Caption, find_captions
from sdlora.data.captions import caption_pipeline
from sdlora.data.folders import (
    HELDOUT,
    check_folder,
    is_heldout,
    is_image,
    list_usable,
    no_images_error,
    read_repeats,
)
from sdlora.data.images import UnreadableImageError, measure_file, parse_color
from sdlora.data.masks import find_masks
from sdlora.data.records import DatasetIndex, ImageRecord, Noticed, Size
from sdlora.data.sets import Sets, locate_sets
from sdlora.data.sources import open_source
from sdlora.errors import DataError, shorten

# Placeholders of A1111, kohya and ai-toolkit for which there are no words here.
FOREIGN = re.compile(r"\[(?:filewords|name|class|concept)\]|\{(?:caption|filename|name)\}|<trigger>")
AUTO_SHARE, AUTO_FROM, AUTO_LEAST = 0.1, 12, 2


def read_dataset(config: RunConfig, *, resolution: int, min_step: int) -> tuple[DatasetIndex, BucketPlan]:
    """Scans the image folder of a run and plans its buckets for a base of this size."""
    seed, resolution = config.train.seed, config.data.resolution or resolution
    index = scan_dataset(config.images, config.data, seed)
    return index, plan_buckets(
        index.records, resolution, config.data, heldout=index.heldout, min_step=min_step, seed=seed
    )


def scan_dataset(root: str | Path, settings: DataSection, seed: int = 0) -> DatasetIndex:
    """Reads every image and caption below a folder; `data.findings` examines the result.

    The seed and the images' digests decide which are held out, and the variants of captions.

    Raises:
        DataError: If the folder is missing or has no image to train on.
        ConfigError: If `data.background` is not a color.
    """
    root = open_source(root)
    check_folder(root)
    parse_color(settings.background)
    sets, further = locate_sets(root, settings)
    scan = _Scan(settings, seed)
    files = list_usable(root, scan.noticed, settings)
    images = [name for name in files if is_image(name)]
    inside, outside = locate_heldout(root, images, settings.heldout)
    heldout_names = [name for name in images if _is_below(name, inside)]
    unused = [name for name in images if is_heldout(name) and not _is_below(name, inside)]
    training_names = [name for name in images if not _is_below(name, inside) and not is_heldout(name)]
    scan.noticed["data.heldout-unused"] |= dict.fromkeys(unused, "")
    if not training_names:
        raise no_images_error(root, files, scan.noticed)

    records = scan.read(root, files, [*training_names, *heldout_names], sets)
    training = [record for record in records if not _is_below(record.name, inside)]
    heldout = [record for record in records if _is_below(record.name, inside)]
    for folder, its_sets in further:
        training += _read_outside(scan, folder, {record.name for record in training}, its_sets)
    if outside is not None:
        heldout = _read_outside(scan, outside, {record.name for record in training}, sets)
    elif inside is None:
        classes = [record for record in training if record.is_class]
        styled = [record for record in training if not record.is_class]
        training, heldout = hold_out_share(styled, settings.heldout, seed)
        training += classes
    if training and all(record.is_class for record in training):
        problem = f"{root} has class images only, which show no style"
        raise DataError(f"{problem}; add images of the style, or correct data.sets", key="data.only-classes")
    if settings.masks == "files" and not any(record.mask for record in (*training, *heldout)):
        example = PurePosixPath(training_names[0]).with_suffix(".mask.png")
        scan.noticed["data.masks-missing"][str(example)] = ""
    # Once and with one caption each: the held-out loss must not depend on chance.
    heldout = [replace(record, repeats=1, variants=()) for record in heldout]
    by_name = attrgetter("name")
    training, heldout = sorted(training, key=by_name), sorted(heldout, key=by_name)
    return DatasetIndex(root, tuple(training), tuple(heldout), scan.noticed)


def read_captions(root: str | Path, settings: DataSection) -> list[tuple[Path, str]]:
    """All images with their captions, those of held-out folders first; no image is decoded.

    Raises:
        DataError: If a folder is missing.
    """
    root = open_source(root)
    check_folder(root)
    noticed: Noticed = defaultdict(dict)
    sets, further = locate_sets(root, settings)
    folders = [(root, sets), *further]
    files = list_usable(root, noticed, settings)
    inside, outside = locate_heldout(root, filter(is_image, files), settings.heldout)
    if outside:
        folders.insert(0, (outside, Sets(settings, {})))
    captions = []
    for folder, its_sets in folders:
        names = files if folder is root else list_usable(folder, noticed, settings)
        images = [name for name in names if is_image(name) and not its_sets.is_class(name)]
        images.sort(key=lambda name: not _is_below(name, inside))
        found = find_captions(folder, names, images, settings, noticed)
        for name in images:
            text = found[name].text if name in found else its_sets.default_caption(name)
            captions.append((folder / name, caption_pipeline(its_sets.settings_of(name)).plain(text)))
    return captions


class _Scan:
    """Reads images and captions, and collects findings."""

    def __init__(self, settings: DataSection, seed: int) -> None:
        self.settings, self.seed = settings, seed
        self.noticed: Noticed = defaultdict(dict)

    def read(self, root: Path, files: Sequence[str], names: Sequence[str], sets: Sets) -> list[ImageRecord]:
        """Decodes the named images and finds their captions among the files."""
        images = [name for name in files if is_image(name)]
        captions = find_captions(root, files, images, self.settings, self.noticed)
        masks = find_masks(root, names, self.settings.masks, self.noticed, _measure_all)
        records = []
        for name, measured in zip(names, _measure_all([root / name for name in names]), strict=True):
            if isinstance(measured, str):
                self.noticed["data.image-unreadable"][name] = measured
                continue
            digest, size, is_animated = measured
            if is_animated:
                self.noticed["data.image-frames"][name] = ""
            record = self._record(
                ImageRecord(root / name, name, digest, size, "", ""), captions.get(name), sets
            )
            records.append(
                replace(record, repeats=record.repeats * read_repeats(root, name), mask=masks.get(name))
            )
        by_set: dict[int, list[str]] = defaultdict(list)
        for record in records:
            by_set[id(sets.find(record.name))].append(record.name)
        for members in by_set.values():
            self._check_coverage(root, members, captions, sets)
        return records

    def _record(self, record: ImageRecord, found: Caption | None, sets: Sets) -> ImageRecord:
        """The record with the captions, the repeats and the weight that its set gives it."""
        one, settings = sets.find(record.name), sets.settings_of(record.name)
        pipeline = caption_pipeline(settings)
        words = sets.default_caption(record.name)
        source = "default" if words else "trigger" if settings.trigger else ""
        text, source, others = found or Caption(words, source)
        caption, key = pipeline.plain(text), (self.seed, record.digest)
        made = (variant for words in (text, *others) for variant in pipeline.variants(words, *key))
        variants = tuple(dict.fromkeys(made))
        return replace(
            record,
            caption=caption,
            caption_source=source,
            variants=() if variants == (caption,) else variants,
            trigger=settings.trigger or "",
            repeats=one.repeats if one else settings.repeats,
            weight=one.weight if one else 1.0,
            is_class=one is not None and one.is_class,
        )

    def _check_coverage(
        self, root: Path, names: Sequence[str], captions: Mapping[str, Caption], sets: Sets
    ) -> None:
        """No captions without a trigger, and captions for some images only, are errors by default.

        The images are those of one set; class images need no captions.
        """
        settings, noticed = sets.settings_of(names[0]), self.noticed
        written = [name for name in names if name in captions]
        missing = dict.fromkeys((name for name in names if name not in captions), "")
        one = sets.find(names[0])
        needs_none = one is not None and (one.is_class or bool(one.default_caption))
        if missing and not settings.allow_missing_captions and not needs_none:
            if len(missing) < len(names):
                noticed["data.captions-partial"] |= missing
            elif not settings.trigger:
                noticed["data.captions-missing"] |= missing
                above = (root.absolute().parent / name for name in METADATA_FILES)
                noticed["data.captions-above"] |= {str(file): "" for file in above if file.is_file()}
            else:
                noticed["data.captions-trigger"] |= missing
        if not settings.trigger:
            marks = PLACEHOLDERS[: settings.rules]
            unset = {name: mark for mark in marks for name in written if mark in captions[name].text}
            noticed["data.placeholder"] |= unset
        patterns = {"data.placeholder-foreign": FOREIGN}
        if not settings.prompt_weights:
            patterns["data.caption-weights"] = WEIGHT
        for key, pattern in patterns.items():
            found = {name: pattern.findall(captions[name].text) for name in written}
            noticed[key] |= {name: " ".join(marks) for name, marks in found.items() if marks}


def _measure_all(paths: Sequence[Path]) -> list[tuple[str, Size, bool] | str]:
    with warnings.catch_warnings(), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        warnings.filterwarnings("ignore", module=r"PIL\..*")
        return list(pool.map(_measure, paths))


def _measure(path: Path) -> tuple[str, Size, bool] | str:
    """Digest, size and whether it is animated, or why the image cannot be used."""
    state = None
    with suppress(OSError):  # The read below reports it.
        found = path.stat()
        state = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
    return _measure_once(path, state)


@cache
def _measure_once(path: Path, state: tuple[int, ...] | None) -> tuple[str, Size, bool] | str:
    # A command scans its folder twice: for mistakes before torch is imported, and for the run.
    try:
        return measure_file(path)
    except UnreadableImageError as error:
        return error.reason


def locate_heldout(root: Path, images: Iterable[str], value: float | str) -> tuple[str | None, Path | None]:
    """The held-out folder: one inside the image folder (relative), or one elsewhere; neither for a share.

    Raises:
        DataError: If `data.heldout` is a folder that does not exist.
    """
    if value == "auto":
        return (HELDOUT if any(map(is_heldout, images)) else None), None
    if not isinstance(value, str):
        return None, None
    for folder in (root / value, Path(value).expanduser()):
        is_folder = False
        with suppress(OSError):  # The name may be too long.
            is_folder = folder.is_dir()
        if not is_folder:
            continue
        target, home = folder.resolve(), root.resolve()
        if target == home:
            message = f"data.heldout = {folder} is the image folder itself; set another folder, a share or 0"
            raise DataError(message, key="data.heldout")
        return (target.relative_to(home).as_posix(), None) if target.is_relative_to(home) else (None, folder)
    message = f"data.heldout = {shorten(value)} is not a folder; set a folder, a share such as 0.1, or 0"
    raise DataError(message, key="data.heldout")


def _is_below(name: str, folder: str | None) -> bool:
    """Whether a file is in the held-out folder; HELDOUT means any folder of that name."""
    if folder is None:
        return False
    return is_heldout(name) if folder == HELDOUT else name.startswith(f"{folder}/")


def _read_outside(scan: _Scan, folder: Path, taken: set[str], sets: Sets) -> list[ImageRecord]:
    """Images of a set, or held-out ones, from a folder elsewhere; their names start with that folder's."""
    files = list_usable(folder, scan.noticed, scan.settings)
    images = [name for name in files if is_image(name)]
    if not images:
        is_set = "" in sets.inside
        setting = "data.sets" if is_set else f"data.heldout = {scan.settings.heldout}"
        remedy = "name another folder, or remove it" if is_set else "set another folder, a share, or 0"
        message = f"{setting}: no images in {folder}; {remedy}"
        raise DataError(message, key="data.sets" if is_set else "data.heldout")
    prefix = f"{folder.resolve().name}/"
    records = scan.read(folder, files, images, sets)
    while any(prefix + record.name in taken for record in records):
        prefix = f"_{prefix}"
    return [replace(record, name=prefix + record.name) for record in records]


def hold_out_share(
    records: Sequence[ImageRecord], share: float | str, seed: int
) -> tuple[list[ImageRecord], list[ImageRecord]]:
    """Chooses held-out images by digest, evenly over the folders; copies of an image stay together."""
    images = {record.digest: record for record in records}
    if isinstance(share, str):
        number = max(AUTO_LEAST, round(AUTO_SHARE * len(images))) if len(images) >= AUTO_FROM else 0
    else:
        number = min(len(images) - 1, max(1, round(share * len(images)))) if share > 0 and images else 0
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
