"""The distance between pictures."""

from __future__ import annotations

import pytest
import torch
from PIL import Image, ImageDraw

from sdlora.config import BaseSection
from sdlora.evaluation.pictures import picture_distance, to_pixels
from sdlora.models.info import inspect_base
from sdlora.models.load import load_base


@pytest.fixture(scope="module")
def base():
    return load_base(inspect_base(BaseSection()), dtype=torch.float32, device="cpu")


def draw(shift: int = 0, colour: str = "red") -> torch.Tensor:
    image = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(image).ellipse((12 + shift, 12, 50 + shift, 50), fill=colour, outline="black", width=3)
    return to_pixels(image)


def test_order_of_distances(base):
    """Zero for the same picture; a moved outline is nearer than another colour; symmetric."""
    same = picture_distance(base, [draw()], [draw()])
    moved = picture_distance(base, [draw()], [draw(1)])
    other = picture_distance(base, [draw()], [draw(0, "blue")])
    assert same == 0
    assert 0 < moved < other
    assert picture_distance(base, [draw(0, "blue")], [draw()]) == pytest.approx(other)
    assert picture_distance(base, [draw(), draw()], [draw(1), draw(0, "blue")]) == pytest.approx(
        (moved + other) / 2
    )
