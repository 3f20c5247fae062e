"""Scans an image folder: which files are images, what they show, which are held out."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from sdlora.config import DataSection
from sdlora.data.caption_files import find_captions
from sdlora.data.captions import caption_pipeline
from sdlora.data.doctor import (
    report_captions,
    report_files,
    report_frames,
    report_left_out,
    report_records,
    report_unreadable,
)
from sdlora.data.folders import (
    Listing,
    check_folder,
    describe_nothing,
    is_image,
    list_files,
    read_repeats,
)
from sdlora.data.heldout import hold_out_share, is_below, is_heldout, locate_heldout
from sdlora.data.images import UnreadableImageError, measure_file, parse_colour
from sdlora.data.records import DatasetIndex, Finding, ImageRecord, Size
from sdlora.errors import DataError

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class _Measured:
    """What decoding a file gave: `reason` says why it cannot be used."""

    digest: str
    size: Size
    moves: bool = False
    reason: str = ""


def scan_dataset(
    root: str | Path, settings: DataSection, seed: int = 0, *, progress: Progress | None = None
) -> DatasetIndex:
    """Reads every image and caption below a folder.

    Mistakes in single files are findings of the index; `sdlora.data.doctor.examine` gives them all.

    Args:
        root: The image folder; classes and `N_name` folders inside it are found.
        settings: `trigger`, `heldout`, `allow_missing_captions`, `on_bad_image`, `background`,
            `follow_links`.
        seed: Decides, with the images' digests, which share is held out and what random operations do to
            captions.
        progress: Called with (images read, images in all).

    Raises:
        DataError: If the folder is missing or holds no image to train on.
        ConfigError: If `data.background` is not a colour.
    """
    root = Path(root).expanduser()
    check_folder(root)
    parse_colour(settings.background)
    listing = list_files(root, settings.follow_links)
    images = listing.images
    inside, outside = locate_heldout(root, images, settings.heldout)
    training_names = [name for name in images if not is_below(name, inside) and not is_heldout(name)]
    heldout_names = [name for name in images if is_below(name, inside)]
    if not training_names:
        raise DataError(describe_nothing(root, listing))

    records, findings = _read_records(
        root, listing, [*training_names, *heldout_names], settings, seed, progress
    )
    training = [record for record in records if not is_below(record.name, inside)]
    heldout = [record for record in records if is_below(record.name, inside)]
    if outside is not None:
        heldout, noticed = _read_outside(outside, {record.name for record in training}, settings)
        findings += noticed
    elif inside is None:
        training, heldout = hold_out_share(training, settings.heldout, seed)
    findings += report_left_out([n for n in images if is_heldout(n) and not is_below(n, inside)])
    findings += report_records(training, heldout)
    return DatasetIndex(
        root,
        tuple(sorted(training, key=lambda record: record.name)),
        tuple(_as_heldout(record) for record in sorted(heldout, key=lambda record: record.name)),
        tuple(findings),
    )


def _as_heldout(record: ImageRecord) -> ImageRecord:
    """Once, and with one caption: the held-out loss must not depend on chance."""
    return replace(record, repeats=1, variants=())


def _read_records(
    root: Path,
    listing: Listing,
    names: Sequence[str],
    settings: DataSection,
    seed: int,
    progress: Progress | None,
) -> tuple[list[ImageRecord], list[Finding]]:
    """Decodes the named images and finds their captions."""
    captions, findings = find_captions(root, listing.files, listing.images)
    measured = dict(zip(names, _measure_all([root / name for name in names], progress), strict=True))
    good = [name for name in names if not measured[name].reason]
    findings += report_files(listing)
    bad = {name: m.reason for name, m in measured.items() if m.reason}
    bad |= {name: reason for name, reason in listing.unfit.items() if is_image(name)}
    findings += report_unreadable(bad, settings)
    findings += report_frames([name for name in good if measured[name].moves])
    findings += report_captions(root, good, captions, settings)
    pipeline = caption_pipeline(settings)
    records = []
    for name in good:
        found, m = captions.get(name), measured[name]
        text = found.text if found else ""
        source = found.source if found else "trigger" if settings.trigger else ""
        caption, variants = pipeline.plain(text), pipeline.variants(text, seed=seed, digest=m.digest)
        records.append(
            ImageRecord(
                path=root / name,
                name=name,
                digest=m.digest,
                size=m.size,
                caption=caption,
                caption_source=source,
                repeats=read_repeats(root, name),
                variants=() if variants == (caption,) else variants,
            )
        )
    return records, findings


def _read_outside(
    folder: Path, taken: set[str], settings: DataSection
) -> tuple[list[ImageRecord], list[Finding]]:
    """Held-out images from a folder elsewhere; their names start with that folder's."""
    listing = list_files(folder, settings.follow_links)
    if not listing.images:
        raise DataError(
            f"data.heldout = {settings.heldout} has no images; give another folder, a share, or 0"
        )
    records, findings = _read_records(folder, listing, listing.images, settings, 0, None)
    prefix = f"{folder.resolve().name}/"
    while any(prefix + record.name in taken for record in records):
        prefix = f"_{prefix}"
    return [replace(record, name=prefix + record.name) for record in records], findings


def _measure_all(paths: Sequence[Path], progress: Progress | None) -> list[_Measured]:
    results: list[_Measured] = []
    with warnings.catch_warnings(), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        warnings.filterwarnings("ignore", module=r"PIL\..*")
        for number, result in enumerate(pool.map(_measure, paths), 1):
            results.append(result)
            if progress is not None:
                progress(number, len(paths))
    return results


def _measure(path: Path) -> _Measured:
    """Reads a file once: digest, size, and whether it can be decoded to its end."""
    try:
        return _Measured(*measure_file(path))
    except UnreadableImageError as error:
        return _Measured("", Size(1, 1), reason=error.reason)
