"""Drawings redrawn in named manners."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageDraw

from sdlora.builtin.captions import all_pictures, draw_caption, draw_picture
from sdlora.builtin.icons import compose
from sdlora.builtin.manners import PLAIN, Manner, all_manners, redraw


def make_drawing() -> Image.Image:
    drawing = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    ImageDraw.Draw(drawing).ellipse((6, 20, 40, 58), fill=(230, 120, 40, 255))
    return drawing


def darkness(picture: Image.Image) -> int:
    return int((np.asarray(picture.convert("L")) < 60).sum())


def test_the_plain_manner_changes_nothing():
    """The default is the drawing itself."""
    assert np.array_equal(np.asarray(redraw(make_drawing(), PLAIN)), np.asarray(make_drawing()))
    assert all_manners()[0] == PLAIN
    assert len(set(all_manners())) == len(all_manners()) == 20


@pytest.mark.parametrize("style", ["outlined", "line drawing", "ink drawing"])
def test_lines_are_drawn(style):
    """Dark lines around the shape, which the drawing itself does not have."""
    plain = compose(make_drawing(), size=(80, 80))
    lined = compose(redraw(make_drawing(), Manner(style)), size=(80, 80))
    assert darkness(plain) == 0
    assert darkness(lined) > 150
    colour = lined.getpixel((8 + 23, 8 + 39))
    assert (colour[0] > colour[2] + 80) == (style == "outlined")


def test_small_and_mirrored():
    """Size and direction."""
    small = redraw(make_drawing(), Manner(small=True))
    assert small.size == (46, 46)
    mirrored = np.asarray(redraw(make_drawing(), Manner(mirrored=True)))
    assert np.array_equal(mirrored[:, ::-1], np.asarray(make_drawing()))


def test_the_caption_names_the_manner():
    """What is drawn in another way says so; a plain caption means the plain drawing."""
    rng = random.Random(0)
    pictures = [draw_picture(rng, "cat", with_manners=True) for _ in range(400)]
    assert set(pictures) <= set(all_pictures(["cat"], with_manners=True))
    shares = Counter(picture.manner == PLAIN for picture in pictures)
    assert 0.15 < shares[True] / 400 < 0.35
    for picture in pictures:
        caption = draw_caption(rng, picture, drop=False)
        assert caption.endswith(picture.manner.words())
        assert ("mirrored" in caption) == picture.manner.mirrored
    assert all(draw_picture(rng, "cat").manner == PLAIN for _ in range(50))
