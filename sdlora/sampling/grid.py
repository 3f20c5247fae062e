"""The grid: a row for each prompt, seed and setting, the base in the first column, strengths beside it."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, inf, log
from typing import Any, TypeAlias

from PIL import Image, ImageDraw, ImageFont, ImageOps

from sdlora.data.images import label_font
from sdlora.sampling.images import SampledImage, SampleSettings, sampler_of
from sdlora.sampling.targets import Targets

PAPER, INK, SOFT, RULE, EMPTY = "#ffffff", "#1c1c1e", "#7c7c82", "#e3e3e6", "#f1f1f3"
MAX_CELL_PX = 512
MAX_PANELS, SCREEN = 4, 1.6
MAX_PAGE_PX, MAX_COLUMNS = 4096, 12
BASE = ("", 0.0)
EXAMPLE_SCALE = 0.6
AXES: Mapping[str, Callable[[Any], str]] = {
    "guidance": "guidance {:g}".format,
    "scheduler": lambda name: sampler_of(name) or "",
    "steps": "{} steps".format,
}
"""Settings that a grid can compare, with their labels."""

Labels: TypeAlias = Mapping[tuple[str, float], Sequence[str]]
"""Lines above columns, which are (adapter, strength)."""
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
        self.font, self.title_font, self.small_font = map(label_font, (self.text, self.title, self.small))


def make_grid(
    samples: Sequence[SampledImage],
    *,
    title: str = "",
    targets: Targets | None = None,
    labels: Labels | None = None,
) -> Image.Image:
    """Lays samples out so that columns, and rows, can be compared at a glance.

    Args:
        samples: From `generate`, of one adapter or several; a missing sample leaves its cell empty.
        title: One line above the grid.
        targets: Images of the image folder, for a last column and a strip below the title.
        labels: Lines below the heading of columns, such as scores.
    """
    columns, row_of = _columns(samples), _row_labels(samples)
    cells = {(*_column(sample), sample.prompt, row_of(sample)): sample for sample in reversed(samples)}
    rows: dict[str, list[str]] = {}
    for prompt, row in dict.fromkeys((sample.prompt, row_of(sample)) for sample in samples):
        rows.setdefault(prompt, []).append(row)
    width = max(sample.image.width for sample in samples)
    height = max(sample.image.height for sample in samples)
    shrink = min(1.0, MAX_CELL_PX / max(width, height))
    measures = Measures(round(width * shrink), round(height * shrink))
    aim = (targets.heading if targets else "", inf)
    if targets and targets.images:
        columns.append(aim)
    for prompt, image in targets.images.items() if targets else ():
        fitted = ImageOps.contain(image, (measures.width, measures.height), Image.Resampling.LANCZOS)
        cells[*aim, prompt, rows[prompt][0]] = SampledImage(fitted, prompt, 0, 1.0)
    panels = [
        _Panel(measures, columns, part, cells, labels or {}).draw()
        for part in _split(measures, len(columns), rows)
    ]

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
    if strength == inf:
        return adapter
    return f"strength {strength:g}" if strength else "base"


def _column(sample: SampledImage) -> tuple[str, float]:
    """The column of a sample, (adapter, strength); all adapters share the base's."""
    return (sample.adapter, sample.strength) if sample.strength else BASE


def _columns(samples: Sequence[SampledImage]) -> list[tuple[str, float]]:
    """All columns, the base first."""
    return sorted(dict.fromkeys(map(_column, samples)), key=lambda column: column != BASE)


def _row_labels(samples: Sequence[SampledImage]) -> Callable[[SampledImage], str]:
    """What tells the rows of a prompt apart: the seed, and the settings in which samples differ, in lines."""
    axes = varying_axes([sample.settings for sample in samples])

    def label(sample: SampledImage) -> str:
        values = ((AXES[name], getattr(sample.settings, name)) for name in axes)
        return "\n".join([*(text(value) for text, value in values), f"seed {sample.seed}"])

    return label


def varying_axes(settings: Sequence[SampleSettings]) -> list[str]:
    """The names of `AXES` in which settings differ."""
    return [name for name in AXES if len({getattr(one, name) for one in settings}) > 1]


def make_pages(
    samples: Sequence[SampledImage],
    *,
    title: str = "",
    targets: Targets | None = None,
    labels: Labels | None = None,
) -> list[Image.Image]:
    """A grid, divided into several where it would be too large to look at; each has the base's column."""
    width, height = (max(side) for side in zip(*(one.image.size for one in samples), strict=True))
    measures, row_of = Measures(min(MAX_CELL_PX, width), min(MAX_CELL_PX, height)), _row_labels(samples)
    columns = _columns(samples)
    shown = [column for column in columns if column != BASE] or columns
    wide = min(MAX_COLUMNS, max(1, (MAX_PAGE_PX - measures.left) // measures.column - 1))
    rows = list(dict.fromkeys((sample.prompt, row_of(sample)) for sample in samples))
    high = max(1, MAX_PAGE_PX**2 // 2 // ((min(len(shown), wide) + 1) * measures.column * measures.row))
    parts = [shown[at : at + wide] for at in range(0, len(shown), wide)]
    pages = [(set(rows[at : at + high]), part) for at in range(0, len(rows), high) for part in parts]
    drawn = []
    for number, (some, part) in enumerate(pages, 1):
        own = [
            sample
            for sample in samples
            if _column(sample) in (BASE, *part) and (sample.prompt, row_of(sample)) in some
        ]
        prompts = {sample.prompt for sample in own}
        near = targets and replace(
            targets, images={prompt: image for prompt, image in targets.images.items() if prompt in prompts}
        )
        name = f"{title} ({number} of {len(pages)})" if len(pages) > 1 else title
        drawn.append(make_grid(own, title=name, targets=near, labels=labels))
    return drawn


def _split(
    measures: Measures, num_columns: int, groups: Mapping[str, Sequence[str]]
) -> list[dict[str, Sequence[str]]]:
    """Divides prompts into panels side by side, in the number that fits a screen best."""
    width = measures.left + measures.margin + num_columns * measures.column
    height = sum(map(len, groups.values())) * (measures.height + measures.gap)

    def misfit(count: int) -> float:
        return abs(log(count * width / (ceil(height / count) * SCREEN)))

    count = min(range(1, min(MAX_PANELS, len(groups) // 2) + 1), key=misfit, default=1)
    size, rows = ceil(len(groups) / count), list(groups.items())
    return [dict(rows[start : start + size]) for start in range(0, len(rows), size)]


@dataclass
class _Panel:
    """Some prompts of a grid with their rows, in all columns."""

    measures: Measures
    columns: Sequence[tuple[str, float]]
    rows: Mapping[str, Sequence[str]]
    cells: Mapping[tuple[str, float, str, str], SampledImage]
    labels: Labels

    def draw(self) -> Image.Image:
        measures = self.measures
        headings = self._headings()
        top = measures.margin + measures.line * len(headings[0]) + measures.gutter
        heights = [len(rows) * measures.row - measures.gutter for rows in self.rows.values()]
        width = measures.left + len(self.columns) * measures.column - measures.gutter + measures.margin
        height = top + sum(heights) + measures.gap * (len(heights) - 1) + measures.margin
        sheet = Image.new("RGB", (width, height), PAPER)
        pen = ImageDraw.Draw(sheet)
        for number, lines in enumerate(headings):
            self._write(pen, lines, measures.left + number * measures.column, measures.margin)
        y = top
        for (prompt, rows), group_height in zip(self.rows.items(), heights, strict=True):
            if y > top:
                middle = y - measures.gap // 2 - 1
                pen.line((measures.margin, middle, width - measures.margin - 1, middle), RULE)
            # The seed is written at the foot of its row; the prompt ends above the first seed.
            foot = measures.small * (0.3 + 1.3 * len(rows[0].splitlines()))
            room = (measures.height if len(rows) > 1 else group_height) - round(foot)
            lines = _wrap(prompt, measures.font, measures.prompts, max(1, room // measures.line))
            self._write(pen, lines, measures.margin, y - measures.text // 6)
            for number, row in enumerate(rows):
                self._draw_row(sheet, pen, (prompt, row), y + number * measures.row)
            y += group_height + measures.gap
        return sheet

    def _headings(self) -> list[list[str]]:
        """The lines above each column, equally many: its name in up to two, its strength, and its label."""
        font, width = self.measures.font, self.measures.width
        names = [_wrap("" if strength == inf else name, font, width, 2) for name, strength in self.columns]
        labels = [self.labels.get(column, ()) for column in self.columns]
        most, foot = (max(map(len, texts)) for texts in (names, labels))
        blocks = [
            [*name, *(_shorten(line, font, width) for line in (_heading(*column), *label))]
            for name, label, column in zip(names, labels, self.columns, strict=True)
        ]
        return [
            [""] * (most - len(name)) + block + [""] * (foot - len(label))
            for name, label, block in zip(names, labels, blocks, strict=True)
        ]

    def _draw_row(self, sheet: Image.Image, pen: ImageDraw.ImageDraw, row: tuple[str, str], y: int) -> None:
        measures, right, foot = self.measures, self.measures.width - 1, y + self.measures.height
        for number, line in enumerate(reversed(row[1].splitlines())):
            place = (measures.margin, foot - round(number * measures.small * 1.3))
            pen.text(place, line, SOFT, measures.small_font, anchor="ld")
        for number, column in enumerate(self.columns):
            x = measures.left + number * measures.column
            sample = self.cells.get((*column, *row))
            if column[1] == inf and sample is None:
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
        color: str = INK,
        anchor: str = "la",
    ) -> None:
        for number, line in enumerate(lines):
            place = (x, y + number * self.measures.line)
            pen.text(place, line, color, self.measures.font, anchor)


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
