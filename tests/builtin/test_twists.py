"""Small datasets with a twist, for the leaves of an adapter tree."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdlora.builtin.make_twists import HELDOUT, TRAINING, TWISTS, make_twist

IMAGES = Path(__file__).parents[2] / "datasets" / "openmoji"


@pytest.mark.parametrize("name", TWISTS)
def test_the_same_drawings_with_a_twist(name, tmp_path):
    """So many of each part, of the part that they come from, captioned the same, drawn otherwise."""
    make_twist(IMAGES, name, tmp_path)
    for part, count in (("", TRAINING), ("heldout", HELDOUT)):
        pictures = sorted((tmp_path / part).glob("*.png"))
        assert len(pictures) == count
        for picture in pictures:
            original = IMAGES / part / picture.name
            assert picture.with_suffix(".txt").read_text() == original.with_suffix(".txt").read_text()
            with Image.open(picture) as twisted, Image.open(original) as drawn:
                assert twisted.size == drawn.size
                assert np.abs(np.asarray(twisted, float) - np.asarray(drawn.convert("RGB"), float)).mean() > 3
