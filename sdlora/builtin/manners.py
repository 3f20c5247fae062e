"""Redraws a drawing in other manners, which its caption names: outlined, in ink, pale, small, mirrored.

A base that only ever saw one picture of a concept knows it by heart, and nothing else. Named manners teach it
that one thing can be drawn in several ways, so that an adapter has something to turn.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter, ImageOps

INK = (24, 24, 28)
SMALL_SHARE, MIRRORED_SHARE = 0.25, 0.25
STYLE_SHARE = {"": 0.4, "outlined": 0.2, "line drawing": 0.14, "ink drawing": 0.14, "pale": 0.12}
SMALL_SCALE = 0.72
NUM_COLOURS = 7
EDGE_LEVEL = 40


@dataclass(frozen=True)
class Manner:
    """How a drawing is redrawn; the default leaves it as it is."""

    style: str = ""
    small: bool = False
    mirrored: bool = False

    def words(self) -> str:
        """What a caption says of it, such as `, outlined, small`."""
        named = (self.style, "small" if self.small else "", "mirrored" if self.mirrored else "")
        return "".join(f", {word}" for word in named if word)


PLAIN = Manner()


def all_manners() -> list[Manner]:
    """Every manner, the plain one first."""
    return [Manner(*parts) for parts in itertools.product(STYLE_SHARE, (False, True), (False, True))]


def draw_manner(rng: random.Random) -> Manner:
    """Draws style, size and direction, each by itself."""
    style = rng.choices(list(STYLE_SHARE), list(STYLE_SHARE.values()))[0]
    return Manner(style, rng.random() < SMALL_SHARE, rng.random() < MIRRORED_SHARE)


def redraw(drawing: Image.Image, manner: Manner) -> Image.Image:
    """An RGBA drawing in another manner."""
    if manner.style:
        drawing = _restyle(drawing, manner.style)
    if manner.small:
        drawing = drawing.resize(
            (round(drawing.width * SMALL_SCALE), round(drawing.height * SMALL_SCALE)),
            Image.Resampling.LANCZOS,
        )
    return ImageOps.mirror(drawing) if manner.mirrored else drawing


def _restyle(drawing: Image.Image, style: str) -> Image.Image:
    alpha = drawing.getchannel("A").point(lambda value: 255 if value > 127 else 0)
    colours = Image.new("RGB", drawing.size, "white")
    colours.paste(drawing.convert("RGB"), mask=drawing.getchannel("A"))
    if style == "pale":
        faded = Image.blend(colours, Image.new("RGB", drawing.size, "white"), 0.55)
        return _with_alpha(faded, drawing.getchannel("A"))
    flat = colours.filter(ImageFilter.MedianFilter(5)).quantize(NUM_COLOURS).convert("RGB")
    rim = _subtract(alpha.filter(ImageFilter.MaxFilter(3)), alpha.filter(ImageFilter.MinFilter(5)))
    inner = (
        flat.filter(ImageFilter.FIND_EDGES).convert("L").point(lambda value: 255 if value > EDGE_LEVEL else 0)
    )
    inner = Image.fromarray(np.minimum(np.asarray(inner), np.asarray(alpha))).filter(ImageFilter.MaxFilter(3))
    lines = Image.fromarray(np.maximum(np.asarray(rim), np.asarray(inner)))
    if style == "ink drawing":
        dark = colours.convert("L").point(lambda value: 255 if value < 120 else 0)
        lines = Image.fromarray(np.maximum(np.asarray(rim), np.minimum(np.asarray(dark), np.asarray(alpha))))
    fill = flat if style == "outlined" else Image.new("RGB", drawing.size, "white")
    fill.paste(INK, mask=lines)
    whole = Image.fromarray(np.maximum(np.asarray(alpha), np.asarray(lines)))
    return _with_alpha(fill, whole)


def _subtract(one: Image.Image, other: Image.Image) -> Image.Image:
    return Image.fromarray(np.where(np.asarray(other) > 0, 0, np.asarray(one)).astype(np.uint8))


def _with_alpha(picture: Image.Image, alpha: Image.Image) -> Image.Image:
    picture = picture.copy()
    picture.putalpha(alpha)
    return picture
