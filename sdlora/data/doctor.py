"""Preflight: what is wrong or remarkable in an image folder, before a model is loaded."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Protocol

from PIL import Image, ImageDraw, ImageFont

from sdlora.config import DataSection
from sdlora.data.buckets import MAX_LOSS, BucketPlan
from sdlora.data.caption_files import METADATA_FILES, Caption
from sdlora.data.captions import PLACEHOLDER, has_trigger
from sdlora.data.folders import LINKS_REMEDY, Listing, is_image
from sdlora.data.heldout import HELDOUT
from sdlora.data.images import UNREAD_SUFFIXES, crop_image, load_image
from sdlora.data.records import DatasetIndex, Finding, ImageRecord, Severity, count_of
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
    """Images that cannot be decoded (name to reason): an error, or a warning where they are skipped."""
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
    """Images in folders named heldout where another kind of hold-out was asked for."""
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
    """Shared stems (R-21), exact copies, held-out images that are trained on, unlikely repeats."""
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
        # Nobody repeats an image ten thousand times an epoch; a folder named 20240131_holiday says so.
        severity: Severity = "error" if most > MAX_REPEATS else "warning"
        message = f"a folder's name asks for {most} repeats of each image; rename it if it is a date"
        findings.append(Finding(severity, message))
    return findings


LARGE_LOSS = 0.15
LARGE_UPSCALE = 2.0
SHEET_IMAGES, SHEET_COLUMNS, SHEET_CELL = 60, 10, 128


class TokenCount(Protocol):
    """How a tokenizer reads a caption: tokens used of the limit, its pieces, and the words cut off."""

    @property
    def used(self) -> int:
        """Tokens of the whole caption."""

    @property
    def limit(self) -> int:
        """Tokens that the base takes."""

    @property
    def pieces(self) -> Sequence[str]:
        """The tokens as text."""

    @property
    def lost(self) -> str:
        """The end of the caption that is cut off, or empty."""


CountTokens = Callable[[str], TokenCount]


def examine(
    index: DatasetIndex, plan: BucketPlan, settings: DataSection, count_tokens: CountTokens | None
) -> list[Finding]:
    """All findings, errors first; a caller stops on errors.

    Args:
        index: The scanned folder; its own findings are included.
        plan: The buckets.
        settings: `trigger` is used.
        count_tokens: The base's tokenizer, if there is a base.
    """
    findings = [*index.findings, *_examine_sizes(plan)]
    if count_tokens is not None:
        findings += _examine_tokens([*index.records, *index.heldout], settings.trigger, count_tokens)
    if not index.records:
        findings.append(
            Finding("error", f"no image of {index.root} is left to train on; see the lines above")
        )
    order = ("error", "warning", "notice")
    return sorted(findings, key=lambda finding: order.index(finding.severity))


def summary(index: DatasetIndex, plan: BucketPlan, count_tokens: CountTokens | None) -> list[str]:
    """The lines that preflight prints: images, captions, examples, buckets, the worst crops."""
    return [
        *_summarise_images(index),
        *_summarise_examples(index, count_tokens),
        *_summarise_buckets(plan),
        *_summarise_worst(plan),
    ]


def contact_sheet(index: DatasetIndex, plan: BucketPlan, settings: DataSection) -> Image.Image:
    """An image of what the model will see: crops with the share that each lost, the worst first."""
    records = sorted(index.records, key=lambda record: (-round(plan.lost_share(record.name), 3), record.name))
    records = records[:SHEET_IMAGES]
    columns = max(1, min(SHEET_COLUMNS, len(records)))
    rows = max(1, -(-len(records) // columns))
    line = 14
    sheet = Image.new("RGB", (columns * (SHEET_CELL + 6), rows * (SHEET_CELL + 6 + 2 * line)), "white")
    canvas, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for number, record in enumerate(records):
        cell = crop_image(load_image(record.path, settings.background), plan.crops[record.name][0])
        cell.thumbnail((SHEET_CELL, SHEET_CELL))
        left = number % columns * (SHEET_CELL + 6) + 3
        top = number // columns * (SHEET_CELL + 6 + 2 * line) + 3
        sheet.paste(cell, (left + (SHEET_CELL - cell.width) // 2, top + (SHEET_CELL - cell.height) // 2))
        label = PurePosixPath(record.name).name
        label = label if len(label) <= 20 else f"{label[:12]}...{label[-5:]}"
        lost = plan.lost_share(record.name)
        figures = f"{plan.bucket_of(record.name)}" + (f"  -{lost:.0%}" if lost > 0.005 else "")
        canvas.text((left, top + SHEET_CELL), label, "black", font)
        canvas.text((left, top + SHEET_CELL + line), figures, "dimgrey", font)
    return sheet


def _examine_sizes(plan: BucketPlan) -> list[Finding]:
    findings = []
    if plan.worst_loss >= MAX_LOSS:
        findings.append(
            Finding(
                "warning",
                f"data.resolution = {plan.resolution} with buckets in steps of {plan.step} px can cut off "
                f"{plan.worst_loss:.0%} of an image between 1:2 and 2:1; a larger data.resolution cuts less",
            )
        )
    lost = _rank((plan.lost_share(record.name), record.name) for record in plan.records)
    lost = [(share, name) for share, name in lost if share > LARGE_LOSS]
    if lost:
        listed = join_names(f"{name} {share:.0%}" for share, name in lost)
        message = (
            f"{count_of(len(lost), 'image')} cut by more than {LARGE_LOSS:.0%} to fit a bucket: {listed}"
        )
        findings.append(Finding("warning", message, tuple(name for _, name in lost)))
    scaled = _rank((plan.upscale(record), record.name) for record in plan.records)
    small = [(factor, name) for factor, name in scaled if factor > LARGE_UPSCALE]
    if small:
        listed = join_names(f"{name} {factor:.1f} times" for factor, name in small)
        message = f"{count_of(len(small), 'image')} enlarged more than twice and will be blurred: {listed}"
        message += "; use larger files or a smaller data.resolution"
        findings.append(Finding("warning", message, tuple(name for _, name in small)))
    slightly = [(factor, name) for factor, name in scaled if 1.0 < factor <= LARGE_UPSCALE]
    if slightly:
        listed = join_names(f"{name} {factor:.2f} times" for factor, name in slightly)
        message = f"{count_of(len(slightly), 'image')} enlarged: {listed}"
        findings.append(Finding("notice", message, tuple(name for _, name in slightly)))
    return findings


def _rank(pairs: Iterable[tuple[float, str]]) -> list[tuple[float, str]]:
    """Largest first, then by name."""
    return sorted(pairs, key=lambda pair: (-pair[0], pair[1]))


def _examine_tokens(
    records: Sequence[ImageRecord], trigger: str | None, count_tokens: CountTokens
) -> list[Finding]:
    """R-28: which captions are cut, which words are lost, and whether the trigger survives."""
    used = dict.fromkeys((record.name, caption) for record in records for caption in record.captions)
    counts = {caption: count_tokens(caption) for caption in dict.fromkeys(caption for _, caption in used)}
    cut = [(name, caption, counts[caption].lost) for name, caption in used if counts[caption].lost]
    if not cut:
        return []
    listed = join_names(f"{name} loses {_shorten(lost)!r}" for name, _, lost in cut)
    limit = counts[cut[0][1]].limit
    message = f"{count_of(len(cut), 'caption')} longer than {limit} tokens: {listed}; shorten them"
    findings = [Finding("warning", message, _names(cut))]
    robbed = [row for row in cut if trigger and not has_trigger(_kept(row[1], row[2]), trigger)]
    if robbed:
        message = f"the trigger {trigger!r} is cut off from {count_of(len(robbed), 'caption')}: "
        message += f"{join_names(_names(robbed))}; move it to the front"
        findings.append(Finding("error", message, _names(robbed)))
    return findings


def _names(rows: Iterable[tuple[str, str, str]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for name, _, _ in rows))


def _kept(caption: str, lost: str) -> str:
    """The caption without the end that was cut off; tokenizers may have changed case and spaces."""
    squeezed, tail = " ".join(caption.lower().split()), " ".join(lost.lower().split())
    place = squeezed.rfind(tail)
    if place < 0:
        place = max(0, len(squeezed) - len(tail))
    return squeezed[:place]


def _shorten(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _summarise_images(index: DatasetIndex) -> list[str]:
    everything = [*index.records, *index.heldout]
    sources = Counter(record.caption_source for record in everything if record.caption_source)
    captioned = sum(number for source, number in sources.items() if source != "trigger")
    places = ", ".join(f"{number} from {source}" for source, number in sources.most_common())
    lines = [
        f"{count_of(len(index.records), 'image')} to train on, {len(index.heldout)} held out: {index.root}",
        f"{captioned} of {len(everything)} captioned" + (f" ({places})" if places else ""),
    ]
    repeats = Counter(record.repeats for record in index.records)
    if set(repeats) - {1}:
        parts = ", ".join(f"{images} x {times}" for times, images in sorted(repeats.items()))
        samples = sum(record.repeats for record in index.records)
        lines.append(f"repeats: {parts} = {samples} samples an epoch")
    if any(record.variants for record in index.records):
        lines.append(
            f"{index.num_captions} variants of {count_of(len(index.records), 'caption')}, each encoded once"
        )
    return lines


def _summarise_examples(index: DatasetIndex, count_tokens: CountTokens | None) -> list[str]:
    lines = []
    chosen = [index.records[i * len(index.records) // 3] for i in range(min(3, len(index.records)))]
    for record in dict.fromkeys(chosen):
        if count_tokens is None:
            lines.append(f"example {record.name}: {record.caption}")
        else:
            count = count_tokens(record.caption)
            pieces = " | ".join(count.pieces)
            lines.append(f"example {record.name}: {pieces} ({count.used} of {count.limit} tokens)")
    return lines


def _summarise_buckets(plan: BucketPlan) -> list[str]:
    rows = plan.table()
    lines = [
        f"{count_of(len(rows), 'bucket')} of about {plan.resolution}x{plan.resolution}, step {plan.step} px"
    ]
    for size, images, samples in rows:
        lines.append(
            f"  {size!s:>9}  {count_of(images, 'image'):>11}  {count_of(samples, 'sample'):>12} an epoch"
        )
    return lines


def _summarise_worst(plan: BucketPlan) -> list[str]:
    lost = _rank((plan.lost_share(record.name), record.name) for record in plan.records)
    scaled = _rank((plan.upscale(record), record.name) for record in plan.records)
    if not lost:
        return []
    mean = sum(share for share, _ in lost) / len(lost)
    worst = [f"{name} {share:.1%}" for share, name in lost[:3] if share > 0]
    lines = [
        f"area lost to cropping: {mean:.1%} on average" + (f"; most: {', '.join(worst)}" if worst else "")
    ]
    enlarged = [f"{name} {factor:.2f} times" for factor, name in scaled[:3] if factor > 1]
    if enlarged:
        lines.append(f"most enlarged: {', '.join(enlarged)}")
    return lines
