"""Drawings varied in ways that a caption names."""

from __future__ import annotations

import random

import numpy as np
import pytest
from PIL import Image, ImageDraw

from sdlora.builtin.icons import IMAGE_PX
from sdlora.builtin.variants import (
    HUES,
    LETTERED,
    RENDERED_PX,
    STYLES,
    Variant,
    dominant_hue,
    draw_variant,
    recolor,
    render_variant,
)


def make_drawing(color: tuple[int, int, int] = (230, 120, 40)) -> Image.Image:
    drawing = Image.new("RGBA", (RENDERED_PX, RENDERED_PX), (0, 0, 0, 0))
    ImageDraw.Draw(drawing).ellipse((20, 70, 140, 200), fill=(*color, 255))
    return drawing


def render(**properties: object) -> np.ndarray:
    variant = Variant("noto", "owl", **properties)  # type: ignore[arg-type]
    return np.asarray(render_variant(make_drawing(), variant)).astype(int)


def darkness(image: np.ndarray) -> int:
    return int((image.mean(axis=2) < 60).sum())


def test_the_plain_variant_is_the_drawing() -> None:
    """Centred on white, with the margin of every drawing."""
    image = render()
    assert image.shape == (IMAGE_PX, IMAGE_PX, 3)
    assert (image[:8] == 255).all()
    assert abs(image[70, 45] - np.array([230, 120, 40])).max() < 3


@pytest.mark.parametrize(
    "style", ["outlined", "thick outlines", "line drawing", "bold line drawing", "ink drawing"]
)
def test_lines_are_drawn(style: str) -> None:
    """Dark lines around the shape; only outlines leave its color."""
    assert darkness(render()) == 0
    assert darkness(render(style=style)) > 150
    color = render(style=style)[70, 45]
    assert (color[0] > color[2] + 80) == (style in ("outlined", "thick outlines"))


def test_bold_lines_are_bolder() -> None:
    assert darkness(render(style="bold line drawing")) > 1.4 * darkness(render(style="line drawing"))


def test_cut_styles_are_black_and_white() -> None:
    """A woodcut is black where the drawing is dark, a stencil everywhere but on lines between colors."""
    drawing = make_drawing((240, 220, 60))
    ImageDraw.Draw(drawing).rectangle((60, 110, 100, 160), fill=(60, 40, 20, 255))
    for style, light_is_black in (("woodcut", False), ("stencil", True)):
        image = np.asarray(render_variant(drawing, Variant("noto", "owl", style=style))).astype(int)
        side, middle = image[70, 26], image[76, 47]  # in the light ellipse, in the dark rectangle
        assert (side.mean() < 60) == light_is_black
        assert middle.mean() < 60
        rows = image[76, 20:72].mean(axis=1)
        assert (rows > 200).any()
        assert abs(image - image.mean(axis=2, keepdims=True)).max() < 30


@pytest.mark.parametrize("style", STYLES)
def test_every_style_shows_something_else(style: str) -> None:
    """No style leaves the drawing as it is, or takes it away."""
    ground = "black" if style == "chalk drawing" else "white"
    image = render(style=style, ground=ground)
    if style != "poster":  # a drawing of one color is a poster already
        assert abs(image - render(ground=ground)).max() > 40
    assert abs(image - image[0, 0]).max() > 40


def test_small_mirrored_tilted_and_shifted() -> None:
    """Size, direction and place."""
    area = (render().min(axis=2) < 250).sum()
    assert (render(small=True).min(axis=2) < 250).sum() < 0.6 * area
    assert np.array_equal(render(mirrored=True)[:, ::-1], render())
    assert np.array_equal(render(shift=(3, 0))[:, 3:], render()[:, :-3])
    left, right = (render(tilt=side)[:, :, 2].argmin() // IMAGE_PX for side in ("left", "right"))
    assert left > right  # the drawing is left of the middle: turned to the left, it comes down


@pytest.mark.parametrize("color", HUES)
def test_the_dominant_hue_becomes_the_color(color: str) -> None:
    turned = recolor(make_drawing(), color)
    hue = dominant_hue(turned)
    assert hue is not None
    assert min(abs(hue - HUES[color] / 360), 1 - abs(hue - HUES[color] / 360)) < 0.05


def test_a_drawing_without_color_keeps_it() -> None:
    """Gray has no hue to turn; shades are laid over anything."""
    gray = make_drawing((120, 120, 120))
    assert dominant_hue(gray) is None
    assert np.array_equal(np.asarray(recolor(gray, "blue")), np.asarray(gray))
    assert dominant_hue(recolor(gray, "shades of blue")) is not None


def test_what_is_drawn_is_allowed() -> None:
    """Letters are not mirrored, a color in the name stays, black lines are not drawn on black."""
    rng = random.Random(0)
    for _ in range(300):
        assert not draw_variant(rng, "noto", sorted(LETTERED)[0]).mirrored
        assert not draw_variant(rng, "noto", "red-apple").color
        glyph = draw_variant(rng, "emojione-mono", "owl")
        assert not glyph.color
        assert glyph.ground != "black"
