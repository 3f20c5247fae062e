"""The loss curve, from events alone."""

from __future__ import annotations

from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from sdlora.report.plots import draw_loss_curve, loss_figure
from sdlora.runs import RunFolder


def test_a_image_of_the_losses(tmp_path):
    """It is drawn with what there is, also when a step was not finite, and is the same each time."""
    run = RunFolder(tmp_path / "run")
    for step in range(1, 30):
        loss = float("nan") if step == 7 else 1 / step
        run.append("step", step, loss=loss, loss_ema=1 / step)
    for step in (0, 10, 29):
        run.append("heldout", step, split="heldout", loss=0.5 - step / 100)
    run.append("heldout", 20, split="heldout", loss=float("inf"))
    first = draw_loss_curve(run).read_bytes()
    with Image.open(run.loss_curve) as image:
        assert image.width > 2 * image.height > 400
        assert len(image.convert("RGB").getcolors(1 << 20)) > 50
    assert draw_loss_curve(run).read_bytes() == first


def test_what_it_says(tmp_path):
    """The legend has the lowest loss where it is at neither end, and covers no value; steps are whole."""
    run = RunFolder(tmp_path / "run")
    run.append("step", 1, loss=0.5, loss_ema=0.5)
    for step, held, own in ((0, 0.5, 0.4), (1, 0.3, 0.35), (2, 0.4, 0.3)):
        run.append("heldout", step, split="heldout", loss=held)
        run.append("heldout", step, split="train", loss=own)
    figure = loss_figure(run)
    FigureCanvasAgg(figure).draw()
    for axes in figure.axes:
        assert axes.get_legend().get_window_extent().y1 < axes.get_window_extent().y0
        assert all(float(tick).is_integer() for tick in axes.get_xticks())
    assert [text.get_text() for text in figure.axes[1].get_legend().get_texts()] == [
        "held-out images: 0.5000 to 0.4000, lowest 0.3000 at 1",
        "training images: 0.4000 to 0.3000",
    ]


def test_nothing_measured_yet(tmp_path):
    """A run that was stopped at once has an image too."""
    assert draw_loss_curve(RunFolder(tmp_path / "run")).is_file()
