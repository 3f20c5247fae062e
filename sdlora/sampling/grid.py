"""The grid: one row for each prompt and seed, the base in the first column, the strengths after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import ceil, log
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from sdlora.sampling.images import SampledImage, save_images

PAPER, INK, SOFT, RULE, EMPTY = "#ffffff", "#1c1c1e", "#7c7c82", "#e3e3e6", "#f1f1f3"
MAX_CELL_PX = 512
MAX_PANELS, SCREEN = 4, 1.6
BASE = ("", 0.0)

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True, slots=True)
class Layout:
    """Measures of a grid in pixels; all follow from the size of a cell."""

    width: int
    height: int

    @property
    def text(self) -> int:
        """Font size of prompts and headings."""
        return max(12, min(22, round(min(self.width, self.height) / 18)))

    @property
    def title(self) -> int:
        """Font size of the title."""
        return round(self.text * 1.3)

    @property
    def small(self) -> int:
        """Font size of seeds."""
        return max(10, round(self.text * 0.8))

    @property
    def line(self) -> int:
        """Distance of two lines of text."""
        return round(self.text * 1.36)

    @property
    def gutter(self) -> int:
        """Between samples."""
        return max(4, round(min(self.width, self.height) / 42))

    @property
    def gap(self) -> int:
        """Between the rows of two prompts, and between words and samples."""
        return self.gutter * 3

    @property
    def margin(self) -> int:
        """Around everything."""
        return self.text + self.gutter

    @property
    def words(self) -> int:
        """Width of the column of prompts."""
        return max(132, min(340, round(self.width * 0.72)))


def make_grid(samples: Sequence[SampledImage], *, title: str = "") -> Image.Image:
    """Lays samples out so that a glance down a column, or along a row, compares.

    Args:
        samples: From `generate`; those of several adapters may be joined. What is missing stays empty.
        title: Written above, on one line.
    """
    columns = sorted(dict.fromkeys(map(_column, samples)), key=lambda column: column != BASE)
    groups: dict[str, list[int]] = {}
    for sample in samples:
        seeds = groups.setdefault(sample.prompt, [])
        if sample.seed not in seeds:
            seeds.append(sample.seed)
    cells = {(*_column(p), p.prompt, p.seed): p for p in reversed(samples)}
    layout = _layout(samples)
    return _join([_Sheet(layout, columns, part, cells) for part in _panels(layout, columns, groups)], title)


def save_grid(
    folder: Path, images: Sequence[SampledImage], *, base: str, adapter: str | None, title: str
) -> Path:
    """Writes the single images and their grid; returns the path of the grid.

    Args:
        base: Name of the base in the metadata.
        adapter: Name of the adapter in the metadata.
        title: Title of the grid.
    """
    return save_images(folder, images, make_grid(images, title=title), {"base": base, "adapter": adapter})


def _panels(
    layout: Layout, columns: Sequence[object], groups: dict[str, list[int]]
) -> list[dict[str, list[int]]]:
    """Many prompts with few columns stand in panels side by side, for a sheet that fits a screen."""
    width = layout.margin * 2 + layout.words + layout.gap + len(columns) * (layout.width + layout.gutter)
    height = sum(len(seeds) for seeds in groups.values()) * (layout.height + layout.gap)

    def misfit(count: int) -> float:
        return abs(log(count * width / (ceil(height / count) * SCREEN)))

    count = min(range(1, min(MAX_PANELS, len(groups) // 2) + 1), key=misfit, default=1)
    size = ceil(len(groups) / count)
    prompts = list(groups)
    return [{p: groups[p] for p in prompts[i : i + size]} for i in range(0, len(prompts), size)]


def _join(sheets: Sequence[_Sheet], title: str) -> Image.Image:
    """Panels beside each other, below the title."""
    layout, panels = sheets[0].layout, [sheet.draw() for sheet in sheets]
    top = round(layout.title * 2) if title else 0
    width, height = sum(panel.width for panel in panels), top + max(panel.height for panel in panels)
    paper = Image.new("RGB", (width, height), PAPER)
    x = 0
    for panel in panels:
        paper.paste(panel, (x, top))
        x += panel.width
    if title:
        font = _font(layout.title)
        text = _shorten(title, font, width - 2 * layout.margin)
        ImageDraw.Draw(paper).text((layout.margin, layout.margin), text, INK, font)
    return paper


def _column(sample: SampledImage) -> tuple[str, float]:
    """What a column is for; the base is one column, whichever adapter it stands beside."""
    return (sample.adapter, sample.strength) if sample.strength else BASE


def _layout(samples: Sequence[SampledImage]) -> Layout:
    width = max(sample.image.width for sample in samples)
    height = max(sample.image.height for sample in samples)
    shrink = min(1.0, MAX_CELL_PX / max(width, height))
    return Layout(round(width * shrink), round(height * shrink))


@dataclass
class _Sheet:
    """A panel of a grid on its way to paper."""

    layout: Layout
    columns: Sequence[tuple[str, float]]
    groups: dict[str, list[int]]
    cells: dict[tuple[str, float, str, int], SampledImage]

    def draw(self) -> Image.Image:
        measure = self.layout
        left = measure.margin + measure.words + measure.gap
        top = measure.margin
        body = top + measure.line * (1 + self._has_names) + measure.gutter
        heights = [
            len(seeds) * (measure.height + measure.gutter) - measure.gutter for seeds in self.groups.values()
        ]
        width = left + len(self.columns) * (measure.width + measure.gutter) - measure.gutter + measure.margin
        height = body + sum(heights) + measure.gap * (len(heights) - 1) + measure.margin
        sheet = Image.new("RGB", (width, height), PAPER)
        pen = ImageDraw.Draw(sheet)
        for number, column in enumerate(self.columns):
            x = left + number * (measure.width + measure.gutter)
            self._heading(pen, column, x, top)
        y = body
        for (prompt, seeds), group_height in zip(self.groups.items(), heights, strict=True):
            if y > body:
                middle = y - measure.gap // 2 - 1
                pen.line((measure.margin, middle, width - measure.margin - 1, middle), RULE)
            self._prompt(pen, prompt, y, group_height)
            for row, seed in enumerate(seeds):
                self._row(sheet, prompt, seed, left, y + row * (measure.height + measure.gutter))
            y += group_height + measure.gap
        return sheet

    def _heading(self, pen: ImageDraw.ImageDraw, column: tuple[str, float], x: int, y: int) -> None:
        adapter, strength = column
        font = _font(self.layout.text)
        lines = [adapter] * self._has_names + [f"strength {strength:g}" if strength else "base"]
        for number, line in enumerate(lines):
            place = (x, y + number * self.layout.line)
            pen.text(place, _shorten(line, font, self.layout.width), INK, font)

    @property
    def _has_names(self) -> bool:
        return any(adapter for adapter, _ in self.columns)

    def _prompt(self, pen: ImageDraw.ImageDraw, prompt: str, y: int, height: int) -> None:
        measure, font = self.layout, _font(self.layout.text)
        seeds = self.groups[prompt]
        # The seed of a row is written at the foot of its sample; the prompt ends above the first of them.
        room = (measure.height if len(seeds) > 1 else height) - round(measure.small * 1.6)
        lines = _wrap(prompt, font, measure.words, max(1, room // measure.line))
        for number, line in enumerate(lines):
            pen.text((measure.margin, y - measure.text // 6 + number * measure.line), line, INK, font)
        for row, seed in enumerate(seeds):
            foot = y + row * (measure.height + measure.gutter) + measure.height
            pen.text((measure.margin, foot), f"seed {seed}", SOFT, _font(measure.small), anchor="ld")

    def _row(self, sheet: Image.Image, prompt: str, seed: int, x: int, y: int) -> None:
        measure, pen = self.layout, ImageDraw.Draw(sheet)
        for column in self.columns:
            # A hairline around each, or white samples would melt into the paper.
            pen.rectangle((x - 1, y - 1, x + measure.width, y + measure.height), None, RULE)
            sample = self.cells.get((*column, prompt, seed))
            if sample is None or sample.blank:
                self._blank(sheet, x, y, sample.blank if sample else "")
            else:
                image = sample.image.convert("RGB")
                image.thumbnail((measure.width, measure.height), Image.Resampling.LANCZOS)
                sheet.paste(image, (x, y))
            x += measure.width + measure.gutter

    def _blank(self, sheet: Image.Image, x: int, y: int, label: str) -> None:
        """A cell without a sample; it says why (R-47)."""
        measure, font = self.layout, _font(self.layout.text)
        pen = ImageDraw.Draw(sheet)
        pen.rectangle((x, y, x + measure.width - 1, y + measure.height - 1), EMPTY)
        lines = _wrap(label, font, measure.width - 4 * measure.gutter, 4)
        first = y + (measure.height - measure.line * (len(lines) - 1)) / 2
        for number, line in enumerate(lines):
            pen.text((x + measure.width / 2, first + number * measure.line), line, SOFT, font, anchor="mm")


@cache
def _font(size: int) -> Font:
    return ImageFont.load_default(size)


def _shorten(text: str, font: Font, width: float) -> str:
    """One line that fits, with an ellipsis if it had to be cut."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


def _wrap(text: str, font: Font, width: float, limit: int) -> list[str]:
    """Lines that fit; a word that is too long (or a script without spaces) breaks anywhere."""
    lines, line = [], ""
    for word in text.split():
        joined = f"{line} {word}" if line else word
        if font.getlength(joined) <= width:
            line = joined
            continue
        if line:
            lines.append(line)
        while font.getlength(word) > width:
            fits = next(
                end for end in range(len(word) - 1, 0, -1) if end == 1 or font.getlength(word[:end]) <= width
            )
            lines.append(word[:fits])
            word = word[fits:]
        line = word
    lines.append(line)
    if len(lines) > limit:
        lines = [*lines[: limit - 1], _shorten(" ".join(lines[limit - 1 :]), font, width)]
    return lines
