"""`sdlora doctor` without a model: examines an image folder and summarises what training will see."""

from __future__ import annotations

import os
import textwrap
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image, ImageDraw

from sdlora.config import DataSection, RunConfig
from sdlora.data.buckets import MERGE_LOSS, BucketPlan
from sdlora.data.findings import CountTokens, examine, largest_first
from sdlora.data.image_checks import cache_file, examine_images, measure_records
from sdlora.data.images import crop_image, label_font, load_image
from sdlora.data.masks import shade_outside
from sdlora.data.records import DatasetIndex, Finding, ImageRecord, count_of
from sdlora.data.scan import read_dataset
from sdlora.data.sets import describe_sets
from sdlora.errors import ConfigError, join_names
from sdlora.writing import write_file

SHEET_IMAGES, SHEET_COLUMNS, SHEET_CELL = 60, 10, 144
SHEET_LINE, SHEET_LETTERS, CAPTION_LINES = 14, 22, 3


@dataclass(frozen=True)
class Checkup:
    index: DatasetIndex
    buckets: BucketPlan
    summary: list[str]
    findings: list[Finding]
    sheet: Path | None = None

    @property
    def has_errors(self) -> bool:
        return any(finding.severity == "error" for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        """The report for programs."""
        return {
            "ready": not self.has_errors,
            "images": len(self.index.records),
            "heldout_images": len(self.index.heldout),
            "captions": self.index.num_captions,
            "buckets": {str(size): images for size, images, _ in self.buckets.table()},
            "findings": [asdict(finding) for finding in self.findings],
            "contact_sheet": self.sheet,
        }

    def lines(self) -> list[str]:
        """The report that `sdlora doctor` prints."""
        lines = [*self.summary, *(f"{finding.severity}: {finding.message}" for finding in self.findings)]
        if self.sheet is not None:
            lines.append(f"contact sheet: {self.sheet}")
        return [*lines, "not ready to train" if self.has_errors else "ready to train"]


def check_images(
    config: RunConfig,
    *,
    resolution: int,
    min_step: int,
    count_tokens: CountTokens | None = None,
    sheet: Path | None = None,
    cache: Path | None = None,
) -> Checkup:
    """Examines the image folder of a run, and draws a contact sheet if a path is given.

    Given a cache folder, it looks at the images themselves too, which takes a while (`data.image_checks`).

    Raises:
        DataError: If the folder is missing or has no image to train on.
        ConfigError: If the contact sheet would be one of the images.
    """
    if sheet is not None and Path(os.path.realpath(sheet)).is_relative_to(os.path.realpath(config.images)):
        raise ConfigError(
            f"--contact-sheet {sheet} is inside the image folder and would be trained on; use another path",
            key="option--contact-sheet",
        )
    index, buckets = read_dataset(config, resolution=resolution, min_step=min_step)
    if cache is not None:
        file = cache_file(cache, index.root, config.data.background)
        records = [*index.records, *index.heldout]
        examine_images(index, measure_records(records, config.data.background, file))
    findings = examine(index, buckets, config.data, count_tokens)
    if sheet is not None:
        drawing = contact_sheet(index, buckets, config.data)
        write_file(sheet, lambda path: drawing.save(path, format="PNG"))
    return Checkup(index, buckets, summarise(index, buckets, count_tokens), findings, sheet)


def summarise(index: DatasetIndex, plan: BucketPlan, count_tokens: CountTokens | None) -> list[str]:
    """Lines about images, captions, examples, buckets and the worst crops."""
    return [*_summarise_images(index), *_summarise_examples(index, count_tokens), *_summarise_buckets(plan)]


def contact_sheet(index: DatasetIndex, plan: BucketPlan, settings: DataSection) -> Image.Image:
    """Draws what the model will see, with captions: crops and the share of area that each lost.

    Training images come first, the worst crops before others, and held-out images after them.
    """
    training = sorted(
        index.records, key=lambda record: (-round(plan.lost_share(record.name), 3), record.name)
    )
    spare = max(SHEET_IMAGES // 6, SHEET_IMAGES - len(training))
    heldout = index.heldout[:spare]
    records = [*training[: SHEET_IMAGES - len(heldout)], *heldout]
    columns = max(1, min(SHEET_COLUMNS, len(records)))
    width, height = SHEET_CELL + 8, SHEET_CELL + 10 + SHEET_LINE * (2 + CAPTION_LINES)
    sheet = Image.new("RGB", (columns * width, max(1, -(-len(records) // columns)) * height), "white")
    canvas, font = ImageDraw.Draw(sheet), label_font(11)
    for number, record in enumerate(records):
        crop = plan.crops[record.name][0]
        cell = crop_image(load_image(record.path, settings.background), crop)
        cell = shade_outside(cell, record, crop) if record.mask else cell
        cell.thumbnail((SHEET_CELL, SHEET_CELL))
        left, top = number % columns * width + 4, number // columns * height + 4
        sheet.paste(cell, (left + (SHEET_CELL - cell.width) // 2, top + (SHEET_CELL - cell.height) // 2))
        is_heldout = number >= len(records) - len(heldout)
        for row, (text, color) in enumerate(_cell_lines(record, plan, is_heldout)):
            canvas.text((left, top + SHEET_CELL + 1 + row * SHEET_LINE), text, color, font)
    return sheet


def _cell_lines(record: ImageRecord, plan: BucketPlan, is_heldout: bool) -> list[tuple[str, str]]:
    """Name, figures and caption below an image of the contact sheet, with their colors."""
    label, lost = PurePosixPath(record.name).name, plan.lost_share(record.name)
    label = label if len(label) <= SHEET_LETTERS else f"{label[: SHEET_LETTERS - 8]}...{label[-5:]}"
    figures = f"{plan.bucket_of(record.name)}" + (f"  -{lost:.0%}" if lost > 0.005 else "")
    figures += "  held out" if is_heldout else ""
    caption = textwrap.wrap(record.caption or "(no caption)", SHEET_LETTERS)
    if len(caption) > CAPTION_LINES:
        caption[CAPTION_LINES - 1] = f"{caption[CAPTION_LINES - 1][: SHEET_LETTERS - 3]}..."
    color = "teal" if is_heldout else "dimgrey"
    return [(label, "black"), (figures, color), *((line, "#444466") for line in caption[:CAPTION_LINES])]


def _summarise_images(index: DatasetIndex) -> list[str]:
    everything = [*index.records, *index.heldout]
    sources = Counter(record.caption_source for record in everything if record.caption_source)
    captioned = sum(number for source, number in sources.items() if source not in ("trigger", "default"))
    places = ", ".join(f"{number} from {source}" for source, number in sources.most_common())
    lines = [
        f"{count_of(len(index.records), 'image')} to train on, {len(index.heldout)} held out: {index.root}",
        f"{captioned} of {len(everything)} captioned" + (f" ({places})" if places else ""),
    ]
    repeats = Counter(record.repeats for record in index.records)
    if set(repeats) - {1}:
        parts = ", ".join(f"{images} x {times}" for times, images in sorted(repeats.items()))
        samples = sum(record.repeats for record in index.records)
        lines.append(f"repeats: {parts} = {samples} samples per epoch")
    if masked := sum(record.mask is not None for record in index.records):
        lines.append(f"masks: of {count_of(masked, 'image')}")
    if about_sets := describe_sets(index.records):
        lines.append(about_sets)
    if any(record.variants for record in index.records):
        lines.append(f"caption variants: {index.num_captions}, each encoded once")
    return lines


def _summarise_examples(index: DatasetIndex, count_tokens: CountTokens | None) -> list[str]:
    lines = []
    chosen = [index.records[i * len(index.records) // 3] for i in range(min(3, len(index.records)))]
    for record in dict.fromkeys(chosen):
        text = record.caption
        if count_tokens is not None:
            count = count_tokens(text)
            text = f"{' | '.join(count.pieces)} ({count.used} of {count.limit} tokens)"
        lines.append(f"example {record.name}: {text}")
    return lines


def _summarise_buckets(plan: BucketPlan) -> list[str]:
    rows, side = plan.table(), plan.resolution
    lines = [f"{count_of(len(rows), 'bucket')} of about {side}x{side}, step {plan.step} px"]
    lines += [
        f"  {size!s:>9}  {count_of(images, 'image'):>11}  {count_of(samples, 'sample'):>12} per epoch"
        for size, images, samples in rows
    ]
    if plan.moved:
        names = join_names(f"{name} {old} to {new}" for name, old, new in plan.moved)
        lines.append(f"data.merge_buckets = {plan.least} moved {count_of(len(plan.moved), 'image')}: {names}")
    if small := [f"{size} ({samples})" for size, samples in plan.small()]:
        kept = f"any other would crop more than {MERGE_LOSS:.0%}"
        lines.append(f"still below {plan.least} samples: {join_names(small)}; {kept}")
    if (views := sum(len(plan.crops[record.name]) for record in plan.records)) > len(plan.records):
        lines.append(f"views: {views} of {count_of(len(plan.records), 'image')}, each encoded once")
    lost = largest_first((plan.lost_share(record.name), record.name) for record in plan.records)
    if lost:
        mean = sum(share for share, _ in lost) / len(lost)
        worst = ", ".join(f"{name} {share:.1%}" for share, name in lost[:3] if share > 0)
        lines.append(f"area lost to cropping: {mean:.1%} on average{f'; most: {worst}' if worst else ''}")
    scaled = largest_first((plan.upscale(record), record.name) for record in plan.records)
    if enlarged := ", ".join(f"{name} {factor:.2f} times" for factor, name in scaled[:3] if factor > 1):
        lines.append(f"most enlarged: {enlarged}")
    return lines
