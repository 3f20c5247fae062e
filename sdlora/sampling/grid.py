"""The grid: one row for each prompt and seed, the base in the first column, the strengths after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from PIL import Image, ImageDraw, ImageFont

from sdlora.sampling.pictures import Picture, save_pictures

__all__ = ["make_grid", "save_pictures"]

PAPER, INK, SOFT, RULE, EMPTY = "#ffffff", "#1c1c1e", "#7c7c82", "#e3e3e6", "#f1f1f3"
MAX_CELL_PX = 512
BASE = ("", 0.0)
WITHHELD = "withheld by the safety checker"

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
        """Between pictures."""
        return max(4, round(min(self.width, self.height) / 42))

    @property
    def gap(self) -> int:
        """Between the rows of two prompts, and between words and pictures."""
        return self.gutter * 3

    @property
    def margin(self) -> int:
        """Around everything."""
        return self.text + self.gutter

    @property
    def words(self) -> int:
        """Width of the column of prompts."""
        return max(132, min(340, round(self.width * 0.72)))


def make_grid(pictures: Sequence[Picture], *, title: str = "") -> Image.Image:
    """Lays pictures out so that a glance down a column, or along a row, compares.

    Args:
        pictures: From `generate`; those of several adapters may be joined. What is missing stays empty.
        title: Written above, on one line.
    """
    columns = sorted(dict.fromkeys(map(_column, pictures)), key=lambda column: column != BASE)
    groups: dict[str, list[int]] = {}
    for picture in pictures:
        seeds = groups.setdefault(picture.prompt, [])
        if picture.seed not in seeds:
            seeds.append(picture.seed)
    cells = {(*_column(p), p.prompt, p.seed): p for p in reversed(pictures)}
    layout = _layout(pictures)
    return _Sheet(layout, columns, groups, cells, title).draw()


def _column(picture: Picture) -> tuple[str, float]:
    """What a column is for; the base is one column, whichever adapter it stands beside."""
    return (picture.adapter, picture.strength) if picture.strength else BASE


def _layout(pictures: Sequence[Picture]) -> Layout:
    width = max(picture.image.width for picture in pictures)
    height = max(picture.image.height for picture in pictures)
    shrink = min(1.0, MAX_CELL_PX / max(width, height))
    return Layout(round(width * shrink), round(height * shrink))


@dataclass
class _Sheet:
    """A grid on its way to paper."""

    layout: Layout
    columns: Sequence[tuple[str, float]]
    groups: dict[str, list[int]]
    cells: dict[tuple[str, float, str, int], Picture]
    title: str

    def draw(self) -> Image.Image:
        measure = self.layout
        left = measure.margin + measure.words + measure.gap
        top = measure.margin + (round(measure.title * 2) if self.title else 0)
        body = top + measure.line * (1 + self._has_names) + measure.gutter
        heights = [
            len(seeds) * (measure.height + measure.gutter) - measure.gutter for seeds in self.groups.values()
        ]
        width = left + len(self.columns) * (measure.width + measure.gutter) - measure.gutter + measure.margin
        height = body + sum(heights) + measure.gap * (len(heights) - 1) + measure.margin
        sheet = Image.new("RGB", (width, height), PAPER)
        pen = ImageDraw.Draw(sheet)
        if self.title:
            font = _font(measure.title)
            pen.text(
                (measure.margin, measure.margin),
                _shorten(self.title, font, width - 2 * measure.margin),
                INK,
                font,
            )
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
        # The seed of a row is written at the foot of its picture; the prompt ends above the first of them.
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
            # A hairline around each, or white pictures would melt into the paper.
            pen.rectangle((x - 1, y - 1, x + measure.width, y + measure.height), None, RULE)
            picture = self.cells.get((*column, prompt, seed))
            if picture is None or picture.withheld:
                self._blank(sheet, x, y, WITHHELD if picture else "")
            else:
                image = picture.image.convert("RGB")
                image.thumbnail((measure.width, measure.height), Image.Resampling.LANCZOS)
                sheet.paste(image, (x, y))
            x += measure.width + measure.gutter

    def _blank(self, sheet: Image.Image, x: int, y: int, label: str) -> None:
        """A cell without a picture; a withheld one says so (R-47)."""
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
