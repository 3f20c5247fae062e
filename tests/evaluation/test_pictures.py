"""The distance between pictures."""

from __future__ import annotations

import pytest
import torch
from PIL import Image, ImageDraw

from sdlora.config import BaseSection
from sdlora.evaluation.evaluate import Evaluation, remove_trigger
from sdlora.evaluation.heldout import HeldoutLoss
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


@pytest.mark.parametrize(
    ("caption", "bare"),
    [
        ("woodcut, a cat", "a cat"),
        ("a cat, Woodcut, night", "a cat, night"),
        ("a woodcut", "a"),
        ("woodcutter", "woodcutter"),
        ("woodcut", "a picture"),
    ],
)
def test_captions_without_the_trigger(caption, bare):
    """R-30: what bleed is measured with."""
    assert remove_trigger(caption, "woodcut") == bare


def test_bleed():
    """R-30: the share of the style's gain that is there without the trigger."""
    loss = HeldoutLoss(1.0, {}, 4)
    measured = Evaluation(4, loss, loss, 0.8, 0.4, 4, untriggered_distance=0.5)
    assert measured.bleed == pytest.approx(0.75)
    assert "75% of the style is there without it" in measured.lines()[-1]
    assert Evaluation(4, loss, loss, 0.8, 0.4, 4).bleed is None
