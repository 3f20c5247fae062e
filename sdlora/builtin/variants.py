"""Varies a drawing in ways that a caption can name: another style, color, ground, size, direction.

A base that only ever saw one image of a concept knows it by heart, and nothing else. Named variants teach it
that one thing can be drawn in several ways, so that an adapter has something to turn.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from sdlora.builtin.icons import GROUNDS, IMAGE_PX, compose, drawing_px

INK = (24, 24, 28)
PAPER = (250, 250, 248)
HUES: dict[str, int] = {  # degrees
    "red": 0,
    "orange": 28,
    "yellow": 50,
    "green": 115,
    "teal": 175,
    "blue": 215,
    "purple": 270,
    "pink": 330,
}
STYLES = (
    "outlined",
    "thick outlines",
    "line drawing",
    "bold line drawing",
    "ink drawing",
    "silhouette",
    "pale",
    "poster",
    "grayscale",
    "chalk drawing",
    "woodcut",
    "stencil",
)
COLORLESS = frozenset(STYLES) - {"outlined", "thick outlines", "pale", "poster"}
LETTERED = frozenset({"ambulance", "bus", "fire-engine", "racing-car", "soccer-ball", "taxi"})  # not mirrored
RENDERED_PX = 2 * drawing_px(IMAGE_PX)  # styles are drawn at twice the size: their lines come out smooth
FINE_PX, BOLD_PX = 5, 9  # of lines, at that size
LINE_PX = {"thick outlines": BOLD_PX, "bold line drawing": BOLD_PX, "woodcut": BOLD_PX}
NUM_COLORS = 7
POSTER_COLORS = 4
EDGE_LEVEL = 40
CHROMA_SHARE = 0.03  # of the drawing's area: with less, there is no color to change
SMALL_SCALE = 0.68
TILTED_SCALE = 0.84
TILT_DEGREES = 18
JITTER_PX = 4
JITTER_SCALE = 0.9


@dataclass(frozen=True)
class Variant:
    """What one training image shows; its caption says all but `scale` and `shift`, which are hardly seen.

    Attributes:
        style: One of `STYLES`; "" leaves the drawing as it is.
        color: A key of `HUES` to which the dominant hue is turned, or "shades of COLOR"; "" for its own.
        tilt: "", "left" or "right".
        scale: Of the drawing.
        shift: Of the drawing, in pixels to the right and down.
    """

    icon_set: str
    concept: str
    ground: str = "white"
    style: str = ""
    color: str = ""
    tilt: str = ""
    small: bool = False
    mirrored: bool = False
    scale: float = 1.0
    shift: tuple[int, int] = (0, 0)

    @property
    def is_plain(self) -> bool:
        return self == Variant(self.icon_set, self.concept)

    @property
    def is_moved(self) -> bool:
        """Whether its shape is elsewhere than in the plain drawing."""
        return bool(self.tilt or self.small or self.mirrored) or self.scale != 1.0 or self.shift != (0, 0)


def names_color(concept: str) -> bool:
    """Whether the name of the concept says its color already, as `red-apple` does."""
    return any(color in concept for color in (*HUES, "blue"))


def draw_variant(rng: random.Random, icon_set: str, concept: str) -> Variant:
    """Draws each property by itself, so that their combinations are seen too."""
    glyph = icon_set == "emojione-mono"  # black on nothing: it has no other style and no color
    style = rng.choice(STYLES) if rng.random() < 0.6 and not glyph else ""
    ground = rng.choice([name for name in GROUNDS if name != "white"]) if rng.random() < 0.35 else "white"
    color = ""
    if style not in COLORLESS and not glyph and not names_color(concept) and rng.random() < 0.35:
        color = rng.choice(list(HUES))
        if rng.random() < 0.25:
            color = f"shades of {color}"
    if style == "chalk drawing":
        ground = "black"
    elif ground == "black" and (glyph or style in COLORLESS):
        ground = "white"
    tilt = rng.choice(("left", "right")) if rng.random() < 0.1 else ""
    mirrored = concept not in LETTERED and rng.random() < 0.15
    jittered = rng.random() < 0.6
    return Variant(
        icon_set,
        concept,
        ground,
        style,
        color,
        tilt,
        small=not tilt and rng.random() < 0.12,
        mirrored=mirrored,
        scale=round(rng.uniform(JITTER_SCALE, 1), 3) if jittered else 1.0,
        shift=(rng.randint(-JITTER_PX, JITTER_PX), rng.randint(-JITTER_PX, JITTER_PX))
        if jittered
        else (0, 0),
    )


def render_variant(drawing: Image.Image, variant: Variant) -> Image.Image:
    """The RGB image that a variant shows, of an RGBA drawing of `RENDERED_PX`."""
    if variant.color:
        drawing = recolor(drawing, variant.color)
    if variant.style:
        drawing = restyle(drawing, variant.style)
    if variant.mirrored:
        drawing = ImageOps.mirror(drawing)
    scale = variant.scale * (SMALL_SCALE if variant.small else 1) * (TILTED_SCALE if variant.tilt else 1)
    size_px = round(drawing_px(IMAGE_PX) * scale)
    drawing = drawing.resize((size_px, size_px), Image.Resampling.LANCZOS)
    if variant.tilt:
        degrees = TILT_DEGREES if variant.tilt == "left" else -TILT_DEGREES
        drawing = drawing.rotate(degrees, Image.Resampling.BICUBIC, expand=True)
    return compose(drawing, variant.ground, shift=variant.shift)


def dominant_hue(drawing: Image.Image) -> float | None:
    """The hue (0 to 1) that most of an RGBA drawing has; None where it has hardly any color."""
    hue, saturation, value = (np.asarray(part) for part in drawing.convert("RGB").convert("HSV").split())
    opaque = np.asarray(drawing.getchannel("A")) / 255.0
    chroma = saturation / 255.0 * (value / 255.0) * opaque
    if chroma.sum() < CHROMA_SHARE * max(1.0, opaque.sum()):
        return None
    weights = np.bincount(hue.ravel(), chroma.ravel(), minlength=256)
    smooth = sum(np.roll(weights, offset) for offset in range(-8, 9))
    return float(np.argmax(smooth)) / 256


def recolor(drawing: Image.Image, color: str) -> Image.Image:
    """Turns all hues of an RGBA drawing so that the dominant one is `color`; or draws it in its shades."""
    alpha = drawing.getchannel("A")
    name = color.removeprefix("shades of ")
    target = HUES[name] / 360
    if name != color:
        dark, bright = (_hsv_to_rgb(target, 0.85, value) for value in (0.3, 0.85))
        shaded = ImageOps.colorize(drawing.convert("RGB").convert("L"), dark, "white", mid=bright)
        return _with_alpha(shaded, alpha)
    own = dominant_hue(drawing)
    if own is None:
        return drawing
    hue, saturation, value = drawing.convert("RGB").convert("HSV").split()
    turned = (np.asarray(hue).astype(int) + round((target - own) * 256)) % 256
    merged = Image.merge("HSV", (Image.fromarray(turned.astype(np.uint8)), saturation, value))
    return _with_alpha(merged.convert("RGB"), alpha)


def restyle(drawing: Image.Image, style: str) -> Image.Image:
    """An RGBA drawing in one of `STYLES`."""
    soft = drawing.getchannel("A")
    alpha = soft.point(lambda level: 255 if level > 127 else 0)
    colors = Image.new("RGB", drawing.size, "white")
    colors.paste(drawing.convert("RGB"), mask=soft)
    if style == "pale":
        return _with_alpha(Image.blend(colors, Image.new("RGB", drawing.size, "white"), 0.55), soft)
    if style == "grayscale":
        return _with_alpha(colors.convert("L").convert("RGB"), soft)
    if style == "silhouette":
        return _with_alpha(Image.new("RGB", drawing.size, INK), soft)
    if style == "poster":
        smooth = colors.filter(ImageFilter.MedianFilter(7))
        return _with_alpha(smooth.quantize(POSTER_COLORS).convert("RGB"), soft)
    flat = colors.filter(ImageFilter.MedianFilter(7)).quantize(NUM_COLORS).convert("RGB")
    rim = _rim(alpha, LINE_PX.get(style, FINE_PX))
    if style in ("woodcut", "stencil"):
        return _cut(colors, flat, alpha, rim, everything=style == "stencil")
    if style == "ink drawing":
        dark = np.asarray(colors.convert("L")) < 120
        lines = np.maximum(rim, np.where(dark, np.asarray(alpha), 0)).astype(np.uint8)
    else:
        lines = np.maximum(rim, _inner_edges(flat, alpha, LINE_PX.get(style, FINE_PX)))
    if style == "chalk drawing":
        return _with_alpha(Image.new("RGB", drawing.size, PAPER), Image.fromarray(lines))
    fill = flat if style in ("outlined", "thick outlines") else Image.new("RGB", drawing.size, "white")
    fill.paste(INK, mask=Image.fromarray(lines))
    return _with_alpha(fill, Image.fromarray(np.maximum(np.asarray(alpha), lines)))


def _cut(
    colors: Image.Image, flat: Image.Image, alpha: Image.Image, rim: np.ndarray, everything: bool
) -> Image.Image:
    """Black and white: what is darker than the drawing's mean, or everything, is black with white lines."""
    light, shape = np.asarray(colors.convert("L")), np.asarray(alpha) > 0
    dark = shape & (everything | (light < light[shape].mean())) if shape.any() else shape
    lines = _inner_edges(flat, alpha, FINE_PX) > 127
    black = np.where(dark, ~lines, lines) | (rim > 127)
    image = Image.new("RGB", flat.size, "white")
    image.paste(INK, mask=Image.fromarray(black))
    return _with_alpha(image, Image.fromarray(np.maximum(np.asarray(alpha), rim)))


def _rim(alpha: Image.Image, line_px: int) -> np.ndarray:
    outside = np.asarray(alpha.filter(ImageFilter.MaxFilter(5)))
    inside = np.asarray(alpha.filter(ImageFilter.MinFilter(line_px)))
    return np.where(inside > 0, 0, outside).astype(np.uint8)


def _inner_edges(flat: Image.Image, alpha: Image.Image, line_px: int) -> np.ndarray:
    edges = flat.filter(ImageFilter.FIND_EDGES).convert("L")
    strong = edges.point(lambda level: 255 if level > EDGE_LEVEL else 0)
    inside = Image.fromarray(np.minimum(np.asarray(strong), np.asarray(alpha)))
    return np.asarray(inside.filter(ImageFilter.MaxFilter(line_px)))


def _hsv_to_rgb(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    parts = (round(255 * part) for part in (hue, saturation, value))
    red, green, blue = Image.new("HSV", (1, 1), tuple(parts)).convert("RGB").getpixel((0, 0))  # type: ignore[misc]
    return red, green, blue


def _with_alpha(image: Image.Image, alpha: Image.Image) -> Image.Image:
    image = image.copy()
    image.putalpha(alpha)
    return image
