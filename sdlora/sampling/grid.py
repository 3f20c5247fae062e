"""The grid: a row for each prompt and seed, the base in the first column, strengths beside it."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, inf, log
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from sdlora.sampling.images import SampledImage, save_images
from sdlora.sampling.targets import Targets

PAPER, INK, SOFT, RULE, EMPTY = "#ffffff", "#1c1c1e", "#7c7c82", "#e3e3e6", "#f1f1f3"
MAX_CELL_PX = 512
MAX_PANELS, SCREEN = 4, 1.6
BASE, TARGET = ("", 0.0), ("", inf)
EXAMPLE_SCALE = 0.6

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


class Measures:
    """Measures of a grid in pixels, and its fonts; all follow from the width and height of a cell."""

    def __init__(self, width: int, height: int) -> None:
        side = min(width, height)
        self.width, self.height = width, height
        self.gutter = max(4, round(side / 42))
        self.column, self.row = width + self.gutter, height + self.gutter
        # Between the rows of two prompts, and between prompts and images.
        self.gap = self.gutter * 3
        self.text = max(12, min(22, round(side / 18)))
        self.title = round(self.text * 1.3)
        self.small = max(10, round(self.text * 0.8))
        self.line = round(self.text * 1.36)
        self.margin = self.text + self.gutter
        self.prompts = max(132, min(340, round(width * 0.72)))
        self.left = self.margin + self.prompts + self.gap
        self.font, self.title_font, self.small_font = map(
            ImageFont.load_default, (self.text, self.title, self.small)
        )


def make_grid(
    samples: Sequence[SampledImage], *, title: str = "", targets: Targets | None = None
) -> Image.Image:
    """Lays samples out so that columns, and rows, can be compared at a glance.

    Args:
        samples: From `generate`, of one adapter or several; a missing sample leaves its cell empty.
        title: One line above the grid.
        targets: Images of the image folder, for a last column and a strip below the title.
    """
    columns = sorted(dict.fromkeys(map(_column, samples)), key=lambda column: column != BASE)
    cells = {(*_column(sample), sample.prompt, sample.seed): sample for sample in reversed(samples)}
    seeds: dict[str, list[int]] = {}
    for prompt, seed in dict.fromkeys((sample.prompt, sample.seed) for sample in samples):
        seeds.setdefault(prompt, []).append(seed)
    width = max(sample.image.width for sample in samples)
    height = max(sample.image.height for sample in samples)
    shrink = min(1.0, MAX_CELL_PX / max(width, height))
    measures = Measures(round(width * shrink), round(height * shrink))
    if targets and targets.images:
        columns.append(TARGET)
    for prompt, image in targets.images.items() if targets else ():
        fitted = ImageOps.contain(image, (measures.width, measures.height), Image.Resampling.LANCZOS)
        cells[*TARGET, prompt, seeds[prompt][0]] = SampledImage(fitted, prompt, seeds[prompt][0], 1.0)
    panels = [_Panel(measures, columns, part, cells).draw() for part in _split(measures, len(columns), seeds)]

    width = sum(panel.width for panel in panels)
    strip = _draw_strip(measures, targets.examples, width) if targets and targets.examples else None
    below_title = measures.title * 2 if title else 0
    top = below_title + (strip.height if strip else 0)
    sheet, x = Image.new("RGB", (width, top + max(panel.height for panel in panels)), PAPER), 0
    for panel in panels:
        sheet.paste(panel, (x, top))
        x += panel.width
    if strip:
        sheet.paste(strip, (0, below_title))
    if title:
        text = _shorten(title, measures.title_font, sheet.width - 2 * measures.margin)
        ImageDraw.Draw(sheet).text((measures.margin, measures.margin), text, INK, measures.title_font)
    return sheet


def save_grid(
    folder: Path,
    images: Sequence[SampledImage],
    *,
    base: str,
    adapter: str | None,
    title: str,
    targets: Targets | None = None,
) -> Path:
    """Writes the images and their grid, with the names of base and adapter as metadata; returns its path."""
    grid = make_grid(images, title=title, targets=targets)
    return save_images(folder, images, grid, {"base": base, "adapter": adapter})


def _draw_strip(measures: Measures, examples: Sequence[Image.Image], width: int) -> Image.Image:
    """A row of small images, as many as fit."""
    side = round(measures.height * EXAMPLE_SCALE), round(measures.width * EXAMPLE_SCALE)
    strip = Image.new("RGB", (width, measures.margin + side[0] + measures.gutter), PAPER)
    pen, top = ImageDraw.Draw(strip), measures.margin
    lines = _wrap("from the image folder", measures.font, measures.prompts, 2)
    pen.text((measures.margin, top - measures.text // 6), "\n".join(lines), INK, measures.font)
    room = (width - measures.left - measures.margin + measures.gutter) // (side[1] + measures.gutter)
    for number, example in enumerate(examples[: max(1, room)]):
        image = ImageOps.contain(example, (side[1], side[0]), Image.Resampling.LANCZOS)
        x = measures.left + number * (side[1] + measures.gutter)
        pen.rectangle((x - 1, top - 1, x + image.width, top + image.height), None, RULE)
        strip.paste(image, (x, top))
    return strip


def _heading(adapter: str, strength: float) -> str:
    if (adapter, strength) == TARGET:
        return "target"
    return f"strength {strength:g}" if strength else "base"


def _column(sample: SampledImage) -> tuple[str, float]:
    """The column of a sample, (adapter, strength); all adapters share the base's."""
    return (sample.adapter, sample.strength) if sample.strength else BASE


def _split(
    measures: Measures, num_columns: int, seeds: Mapping[str, Sequence[int]]
) -> list[dict[str, Sequence[int]]]:
    """Divides prompts into panels side by side, in the number that fits a screen best."""
    width = measures.left + measures.margin + num_columns * measures.column
    height = sum(map(len, seeds.values())) * (measures.height + measures.gap)

    def misfit(count: int) -> float:
        return abs(log(count * width / (ceil(height / count) * SCREEN)))

    count = min(range(1, min(MAX_PANELS, len(seeds) // 2) + 1), key=misfit, default=1)
    size, rows = ceil(len(seeds) / count), list(seeds.items())
    return [dict(rows[start : start + size]) for start in range(0, len(rows), size)]


@dataclass
class _Panel:
    """Some prompts of a grid with their seeds, in all columns."""

    measures: Measures
    columns: Sequence[tuple[str, float]]
    seeds: Mapping[str, Sequence[int]]
    cells: Mapping[tuple[str, float, str, int], SampledImage]

    def draw(self) -> Image.Image:
        measures = self.measures
        has_names = any(adapter for adapter, _ in self.columns)
        top = measures.margin + measures.line * (1 + has_names) + measures.gutter
        heights = [len(seeds) * measures.row - measures.gutter for seeds in self.seeds.values()]
        width = measures.left + len(self.columns) * measures.column - measures.gutter + measures.margin
        height = top + sum(heights) + measures.gap * (len(heights) - 1) + measures.margin
        sheet = Image.new("RGB", (width, height), PAPER)
        pen = ImageDraw.Draw(sheet)
        for number, (adapter, strength) in enumerate(self.columns):
            lines = [adapter] * has_names + [_heading(adapter, strength)]
            lines = [_shorten(line, measures.font, measures.width) for line in lines]
            self._write(pen, lines, measures.left + number * measures.column, measures.margin)
        y = top
        for (prompt, seeds), group_height in zip(self.seeds.items(), heights, strict=True):
            if y > top:
                middle = y - measures.gap // 2 - 1
                pen.line((measures.margin, middle, width - measures.margin - 1, middle), RULE)
            # The seed is written at the foot of its row; the prompt ends above the first seed.
            room = (measures.height if len(seeds) > 1 else group_height) - round(measures.small * 1.6)
            lines = _wrap(prompt, measures.font, measures.prompts, max(1, room // measures.line))
            self._write(pen, lines, measures.margin, y - measures.text // 6)
            for row, seed in enumerate(seeds):
                self._draw_row(sheet, pen, prompt, seed, y + row * measures.row)
            y += group_height + measures.gap
        return sheet

    def _draw_row(self, sheet: Image.Image, pen: ImageDraw.ImageDraw, prompt: str, seed: int, y: int) -> None:
        measures, right, foot = self.measures, self.measures.width - 1, y + self.measures.height
        pen.text((measures.margin, foot), f"seed {seed}", SOFT, measures.small_font, anchor="ld")
        for number, column in enumerate(self.columns):
            x = measures.left + number * measures.column
            sample = self.cells.get((*column, prompt, seed))
            if column == TARGET and sample is None:
                continue
            # A hairline around each cell separates white images from the paper.
            pen.rectangle((x - 1, y - 1, x + right + 1, foot), None, RULE)
            if sample and not sample.blank:
                image = sample.image.convert("RGB")
                image.thumbnail((measures.width, measures.height), Image.Resampling.LANCZOS)
                sheet.paste(image, (x, y))
                continue
            # An empty cell, with the reason if there is one.
            pen.rectangle((x, y, x + right, foot - 1), EMPTY)
            reason = sample.blank if sample else ""
            lines = _wrap(reason, measures.font, measures.width - 4 * measures.gutter, 4)
            first = y + (measures.height - measures.line * (len(lines) - 1)) / 2
            self._write(pen, lines, x + measures.width / 2, first, SOFT, "mm")

    def _write(
        self,
        pen: ImageDraw.ImageDraw,
        lines: Iterable[str],
        x: float,
        y: float,
        colour: str = INK,
        anchor: str = "la",
    ) -> None:
        for number, line in enumerate(lines):
            place = (x, y + number * self.measures.line)
            pen.text(place, line, colour, self.measures.font, anchor)


def _fit(text: str, font: Font, width: float) -> int:
    """Number of characters that fit."""
    return bisect(range(1, len(text) + 1), width, key=lambda end: font.getlength(text[:end]))


def _shorten(text: str, font: Font, width: float) -> str:
    """One line that fits, with an ellipsis where it is cut."""
    if font.getlength(text) <= width:
        return text
    return text[: _fit(text, font, width - font.getlength("…"))].rstrip() + "…"


def _wrap(text: str, font: Font, width: float, limit: int) -> list[str]:
    """Lines that fit, broken at spaces, or anywhere in a long word or a script without spaces."""
    lines: list[str] = []
    rest = " ".join(text.split())
    while rest and len(lines) < limit - 1:
        end = max(1, _fit(rest, font, width))
        if end < len(rest):
            end = max(rest.rfind(" ", 0, end + 1), 0) or end
        lines.append(rest[:end])
        rest = rest[end:].lstrip()
    return [*lines, _shorten(rest, font, width)] if rest else lines
