"""The spectrum as an image."""

from __future__ import annotations

import pytest
from PIL import Image

from sdlora.report.plots import draw_spectrum


def test_a_image_of_the_values(tmp_path):
    """Modules of different ranks, one that changes nothing; the same bytes each time."""
    values = {"a.q": [4.0, 2.0, 1.0], "a.k": [1.0], "b.q": [0.0, 0.0]}
    blocks = {"a.q": "a", "a.k": "a", "b.q": "b"}
    first = draw_spectrum(tmp_path / "one.png", values, blocks, title="style").read_bytes()
    with Image.open(tmp_path / "one.png") as image:
        assert image.width > 2 * image.height > 400
        assert len(image.convert("RGB").getcolors(1 << 20)) > 50
    assert draw_spectrum(tmp_path / "two.png", values, blocks, title="style").read_bytes() == first


@pytest.mark.filterwarnings("error")
def test_a_change_of_nothing_is_drawn(tmp_path):
    """A file whose alpha is 0 has no positive value, which no logarithm shows."""
    assert draw_spectrum(tmp_path / "zero.png", {"a": [0.0, 0.0]}, {"a": "mid_block"}).is_file()
