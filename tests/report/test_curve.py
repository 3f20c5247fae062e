"""The loss curve, from events alone."""

from __future__ import annotations

from PIL import Image

from sdlora.report.curve import draw_loss_curve
from sdlora.runs import RunFolder


def test_a_picture_of_the_losses(tmp_path):
    """It is drawn with what there is, also when a step was not finite, and is the same each time."""
    run = RunFolder(tmp_path / "run")
    for step in range(1, 30):
        loss = "nan" if step == 7 else 1 / step
        run.append("step", step, loss=loss, loss_ema=1 / step)
    for step in (0, 10, 29):
        run.append("heldout", step, split="heldout", loss=0.5 - step / 100)
    first = draw_loss_curve(run).read_bytes()
    with Image.open(run.loss_curve) as picture:
        assert picture.width > 2 * picture.height > 400
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 50
    assert draw_loss_curve(run).read_bytes() == first


def test_nothing_measured_yet(tmp_path):
    """A run that was stopped at once has a picture too."""
    assert draw_loss_curve(RunFolder(tmp_path / "run")).is_file()
