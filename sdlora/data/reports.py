"""Turns what scanning saw into findings: one clear line each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from sdlora.config import DataSection
from sdlora.data.captions import METADATA_FILES, PLACEHOLDER, Caption
from sdlora.data.folders import LINKS_REMEDY, Listing, is_image
from sdlora.data.heldout import HELDOUT
from sdlora.data.images import UNREAD_SUFFIXES
from sdlora.data.records import Finding, ImageRecord, Severity, count_of
from sdlora.errors import join_names

MANY_REPEATS = 100
MAX_REPEATS = 10_000


def report_files(listing: Listing) -> list[Finding]:
    """Files and folders that are not used, where a user may have meant them to be."""
    findings = []
    unread = [name for name in listing.files if PurePosixPath(name).suffix.lower() in UNREAD_SUFFIXES]
    if unread:
        message = f"{count_of(len(unread), 'file')} of a kind that is not read, convert to PNG or JPEG: "
        findings.append(Finding("warning", message + join_names(unread), tuple(unread)))
    if listing.unreadable:
        names = tuple(listing.unreadable)
        findings.append(Finding("warning", f"folders that cannot be opened: {join_names(names)}", names))
    if listing.outward:
        listed = join_names(f"{name} -> {target}" for name, target in listing.outward.items())
        message = (
            f"{count_of(len(listing.outward), 'link')} out of the image folder: {listed}; {LINKS_REMEDY}"
        )
        findings.append(Finding("error", message, tuple(listing.outward)))
    unfit = {name: reason for name, reason in listing.unfit.items() if not is_image(name)}
    if unfit:
        listed = join_names(f"{name} {reason}" for name, reason in unfit.items())
        message = f"{count_of(len(unfit), 'file')} that cannot be read: {listed}"
        findings.append(Finding("warning", message, tuple(unfit)))
    if listing.hidden_images:
        names = tuple(listing.hidden_images)
        message = f"{count_of(len(names), 'image')} in hidden files or folders left out: {join_names(names)}"
        findings.append(Finding("notice", message, names))
    return findings


def report_unreadable(reasons: dict[str, str], settings: DataSection) -> list[Finding]:
    """Pictures that cannot be decoded (name to reason): an error, or a warning where they are skipped."""
    if not reasons:
        return []
    listed = join_names(f"{name} {reason}" for name, reason in reasons.items())
    count = count_of(len(reasons), "image")
    if settings.on_bad_image == "skip":
        return [Finding("warning", f"{count} skipped: {listed}", tuple(reasons))]
    message = f"{count} cannot be used: {listed}; replace or remove them, or set data.on_bad_image=skip"
    return [Finding("error", message, tuple(reasons))]


def report_frames(names: Sequence[str]) -> list[Finding]:
    """Animations and files of several pages."""
    if not names:
        return []
    message = f"{count_of(len(names), 'image')} with several frames, the first is used: {join_names(names)}"
    return [Finding("notice", message, tuple(names))]


def report_left_out(names: Sequence[str]) -> list[Finding]:
    """Pictures in folders named heldout where another kind of hold-out was asked for."""
    if not names:
        return []
    message = f"{count_of(len(names), 'image')} in folders named {HELDOUT} left out: never trained on"
    return [Finding("notice", message, tuple(names))]


def report_captions(
    root: Path, names: Sequence[str], captions: dict[str, Caption], settings: DataSection
) -> list[Finding]:
    """R-05: no caption without a trigger, and captions for a part only, are mistakes unless allowed."""
    bare = tuple(name for name in names if name not in captions)
    findings = []
    if bare and not settings.allow_missing_captions:
        if len(bare) < len(names):
            message = f"{len(bare)} of {len(names)} images have no caption: {join_names(bare)}"
            remedy = "write the missing ones, or set data.allow_missing_captions=true"
            findings.append(Finding("error", f"{message}; {remedy}", bare))
        elif not settings.trigger:
            message = f"no captions for {count_of(len(bare), 'image')}: {join_names(bare)}"
            remedy = f"write .txt files beside them, or set data.trigger{_hint_above(root)}"
            findings.append(Finding("error", f"{message}; {remedy}", bare))
    if not settings.trigger:
        open_ones = tuple(n for n in names if n in captions and PLACEHOLDER in captions[n].text)
        if open_ones:
            message = (
                f"{PLACEHOLDER} in captions but data.trigger is not set: {join_names(open_ones)}; set it"
            )
            findings.append(Finding("error", message, open_ones))
    return findings


def _hint_above(root: Path) -> str:
    above = root.absolute().parent
    found = next((name for name in METADATA_FILES if (above / name).is_file()), None)
    return f"; {above / found} is outside the image folder, point at {above} to use it" if found else ""


def report_records(training: Sequence[ImageRecord], heldout: Sequence[ImageRecord]) -> list[Finding]:
    """Shared stems (R-21), exact copies, held-out pictures that are trained on, unlikely repeats."""
    findings = []
    stems: dict[PurePosixPath, list[str]] = defaultdict(list)
    copies: dict[str, list[str]] = defaultdict(list)
    for record in training:
        stems[PurePosixPath(record.name).with_suffix("")].append(record.name)
        copies[record.digest].append(record.name)
    shared = [name for names in stems.values() if len(names) > 1 for name in names]
    if shared:
        message = f"images with one stem share a caption file: {join_names(shared)}; rename one of each"
        findings.append(Finding("warning", message, tuple(shared)))
    same = [join_names(names, separator=" = ") for names in copies.values() if len(names) > 1]
    if same:
        names = tuple(name for group in copies.values() if len(group) > 1 for name in group)
        findings.append(Finding("warning", f"exact copies: {join_names(same)}; keep one of each", names))
    leaked = tuple(record.name for record in heldout if record.digest in copies)
    if leaked:
        message = f"held-out images that are trained on too: {join_names(leaked)}; remove one of each"
        findings.append(Finding("warning", message, leaked))
    most = max((record.repeats for record in training), default=0)
    if most > MANY_REPEATS:
        # Nobody repeats a picture ten thousand times an epoch; a folder named 20240131_holiday says so.
        severity: Severity = "error" if most > MAX_REPEATS else "warning"
        message = f"a folder's name asks for {most} repeats of each image; rename it if it is a date"
        findings.append(Finding(severity, message))
    return findings
