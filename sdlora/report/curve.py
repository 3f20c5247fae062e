"""The loss curve of a run as a picture."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sdlora.report.course import SPLITS, losses_of
from sdlora.runs import RunFolder
from sdlora.writing import write_file

STYLES = {"heldout": ("tab:red", "o-"), "train": ("tab:blue", "s-")}


def draw_loss_curve(run: RunFolder) -> Path:
    """Draws the losses of a run into its folder.

    Returns:
        The picture's path.
    """
    figure = loss_figure(run)
    # Without the library's version in it, the same run gives the same bytes.
    metadata = {"Software": None}
    return write_file(
        run.loss_curve,
        lambda path: FigureCanvasAgg(figure).print_png(str(path), metadata=metadata),
    )


def loss_figure(run: RunFolder) -> Figure:
    """The training loss, its running mean, and the held-out loss over the steps.

    The two are not on one scale: the training loss is of random timesteps, the held-out loss of
    fixed ones. So each has its own panel.
    """
    steps = [event for event in run.events("step") if isinstance(event["loss"], float | int)]
    figure = Figure(figsize=(9, 4), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True)
    numbers = [event["step"] for event in steps]
    left.plot(numbers, [event["loss"] for event in steps], color="0.8", linewidth=0.7, label="each step")
    left.plot(numbers, [event["loss_ema"] for event in steps], color="tab:blue", label="running mean")
    left.set(title="training loss", xlabel="step", ylabel="loss")
    for split, (colour, style) in STYLES.items():
        if measured := losses_of(run, split):
            values = list(measured.values())
            label = f"{SPLITS[split]}: {values[0]:.4f}" + (f" to {values[-1]:.4f}" if len(values) > 1 else "")
            best = min(measured, key=lambda step: measured[step])
            if measured[best] < min(values[0], values[-1]):
                label += f", lowest {measured[best]:.4f} at {best}"
            right.plot(list(measured), values, style, color=colour, markersize=4, label=label)
    right.set(title="loss at fixed noise", xlabel="step")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if axes.lines:
            # Below, where it covers no value.
            axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    figure.suptitle(run.name, fontsize=10)
    return figure
