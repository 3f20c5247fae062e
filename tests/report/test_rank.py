"""What each rank keeps, as an image."""

from __future__ import annotations

from PIL import Image

from sdlora.report.plots import draw_rank_curve


def test_a_image_of_the_ranks(tmp_path):
    """Shares may fall below nothing; the same bytes each time; one rank alone is drawn too."""
    shares = {"of what was learned": [-0.2, 0.9, 1.0], "of the energy": [0.3, 0.8, 1.0]}
    images = [
        draw_rank_curve(
            tmp_path / name, {1: 0.3, 4: 0.21, 16: 0.2}, shares, without=0.29, best=4, title="ink"
        )
        for name in ("one.png", "two.png")
    ]
    assert images[0].read_bytes() == images[1].read_bytes()
    with Image.open(images[0]) as image:
        assert image.width > 2 * image.height > 400
    draw_rank_curve(tmp_path / "alone.png", {1: 0.2}, {"of the energy": [1.0]}, without=0.3, best=1)
