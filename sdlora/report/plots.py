"""Plots: losses of a run, losses by rank, singular values of an adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sdlora.report.summary import SPLITS, losses_of
from sdlora.runs import RunFolder
from sdlora.writing import write_file

Values = Mapping[str, Sequence[float]]
STYLES = {"heldout": ("tab:red", "o-"), "train": ("tab:blue", "s-")}


def draw_loss_curve(run: RunFolder) -> Path:
    return _save(loss_figure(run), run.loss_curve)


def _save(figure: Figure, path: Path, title: str = "") -> Path:
    """Writes a figure as PNG; without Matplotlib's version in it, equal data gives equal bytes."""
    if title:
        figure.suptitle(title, fontsize=10)
    metadata = {"Software": None}
    return write_file(path, lambda file: FigureCanvasAgg(figure).print_png(str(file), metadata=metadata))


def _panels(width: float = 10, *, sharex: bool = False) -> tuple[Figure, Axes, Axes]:
    figure = Figure(figsize=(width, 4), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, sharex=sharex)
    return figure, left, right


def loss_figure(run: RunFolder) -> Figure:
    """Training loss with its running mean, and validation loss, over the steps.

    They have separate panels, since their scales differ: one is measured at random timesteps, the other at
    fixed ones.
    """
    steps = [event for event in run.events("step") if isinstance(event["loss"], float | int)]
    figure, left, right = _panels(9, sharex=True)
    numbers = [event["step"] for event in steps]
    left.plot(numbers, [event["loss"] for event in steps], color="0.8", linewidth=0.7, label="each step")
    left.plot(numbers, [event["loss_ema"] for event in steps], color="tab:blue", label="running mean")
    left.set(title="training loss", xlabel="step", ylabel="loss")
    for split, (color, style) in STYLES.items():
        if measured := losses_of(run, split):
            values = list(measured.values())
            label = f"{SPLITS[split]}: {values[0]:.4f}" + (f" to {values[-1]:.4f}" if len(values) > 1 else "")
            best = min(measured, key=lambda step: measured[step])
            if measured[best] < min(values[0], values[-1]):
                label += f", lowest {measured[best]:.4f} at {best}"
            right.plot(list(measured), values, style, color=color, markersize=4, label=label)
    right.set(title="validation loss", xlabel="step")
    _finish_axes(left, right)
    figure.suptitle(run.name, fontsize=10)
    return figure


def _finish_axes(*panels: Axes) -> None:
    """A grid, whole steps, and a legend below each panel, where it covers nothing."""
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if axes.lines:
            axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16))


def draw_loss_curves(path: Path, runs: Sequence[RunFolder]) -> Path:
    """Plots the losses of several runs over the steps: of training as a running mean, and of validation.

    The validation loss is that of the held-out images, or of the training images where none is held out.
    """
    figure, left, right = _panels(9, sharex=True)
    names = [run.name for run in runs]
    for number, run in enumerate(runs):
        name = run.name if names.count(run.name) == 1 else str(run.path)
        color = colormaps["tab10"](number % 10)
        steps = [event for event in run.events("step") if isinstance(event.get("loss_ema"), float | int)]
        left.plot(
            [event["step"] for event in steps],
            [event["loss_ema"] for event in steps],
            color=color,
            label=name,
        )
        for split in ("heldout", "train"):
            if measured := losses_of(run, split):
                label = f"{name}, {SPLITS[split]}"
                right.plot(
                    list(measured), list(measured.values()), "o-", markersize=4, color=color, label=label
                )
                break
    left.set(title="training loss (running mean)", xlabel="step", ylabel="loss")
    right.set(title="validation loss", xlabel="step")
    _finish_axes(left, right)
    return _save(figure, path)


def draw_rank_curve(
    path: Path,
    losses: Mapping[int, float],
    shares: Values,
    *,
    without: float,
    best: int | None,
    title: str = "",
) -> Path:
    """Plots the validation loss by rank, and the fractions of the full adapter that each rank keeps.

    Args:
        path: The PNG file.
        losses: Validation loss by rank, from the smallest to the adapter's own.
        shares: Fractions kept at each rank, by title.
        without: Validation loss without the adapter.
        best: The recommended rank, if there is one.
        title: Title of the plot.
    """
    ranks = list(losses)
    figure, left, right = _panels()
    label = f"without the adapter: {without:.4f}"
    left.axhline(without, color="0.6", linestyle="--", linewidth=1, label=label)
    label = f"at rank {ranks[-1]}: {losses[ranks[-1]]:.4f}"
    left.plot(ranks, list(losses.values()), "o-", color="tab:red", markersize=4, label=label)
    for what, values in shares.items():
        right.plot(ranks, values, "o-", markersize=4, label=what)
    left.set(title="validation loss", ylabel="loss")
    lowest = min(0.0, *map(min, shares.values()))
    right.set(title="kept of the full adapter", ylabel="fraction", ylim=(lowest - 0.03, 1.1))
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ranks, [str(rank) for rank in ranks])
        axes.set_xlabel("rank")
        if best is not None:
            axes.axvline(best, color="tab:green", linewidth=1, linestyle=":")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    advice = "rank by rank" if best is None else f"rank {best} is enough"
    return _save(figure, path, f"{title}: {advice}" if title else advice)


def draw_choice(
    path: Path, cells: Sequence[Mapping[str, Any]], *, best: int | None, weight: float, title: str = ""
) -> Path:
    """Plots content against style, and style by strength; a curve for each step, from the base on.

    Args:
        path: The PNG file.
        cells: With step, strength, and style and content as value, low and high.
        best: Number of the cell to mark, if any.
        weight: Power of content in the score, style × content^weight, by which cells are compared.
        title: Title of the plot.
    """
    figure, left, right = _panels(11)
    steps = list(dict.fromkeys(cell["step"] for cell in cells))
    palette = colormaps["viridis"]
    for number, step in enumerate(steps):
        own = sorted((cell for cell in cells if cell["step"] == step), key=lambda cell: cell["strength"])
        color = palette(number / max(1, len(steps) - 1) * 0.9)
        look: dict[str, Any] = {"color": color, "markersize": 4, "linewidth": 1.2}
        look["label"] = str(step) if isinstance(step, str) else f"step {step}"
        style, content = ([cell[name]["value"] for cell in own] for name in ("style", "content"))
        left.plot([0, *style], [1, *content], "o-", **look)
        strengths = [cell["strength"] for cell in own]
        right.plot([0, *strengths], [0, *style], "o-", **look)
        low, high = ([cell["style"][end] for cell in own] for end in ("low", "high"))
        right.fill_between(strengths, low, high, color=color, alpha=0.1)
    left.plot([0], [1], "s", color="0.4", label="base")
    score = 0.0
    if best is not None:
        x, y = cells[best]["style"], cells[best]["content"]
        across, up = ([[abs(one["value"] - one["low"])], [abs(one["high"] - one["value"])]] for one in (x, y))
        left.errorbar([x["value"]], [y["value"]], up, across, "*", color="tab:red", markersize=11, zorder=3)
        score = x["value"] * y["value"] ** weight
    if score > 0:
        styles = [score * (1 + number / 20) for number in range(20 * 20)]
        points = [(one, (score / one) ** (1 / weight)) for one in styles if one <= left.get_xlim()[1]]
        left.plot(*zip(*points, strict=True), "--", color="0.6", linewidth=1, label="as good")
    left.set(title="content kept by style gained", ylabel="content kept (1: as the base)")
    left.set(xlabel="style (0: base, 1: real images)")
    right.set(title="style by strength, with 95 % intervals", xlabel="strength", ylabel="style")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend(fontsize=7, loc="lower left")
    return _save(figure, path, title)


def draw_spectrum(path: Path, values: Values, blocks: Mapping[str, str], *, title: str = "") -> Path:
    """Plots the singular values of every module, and the cumulative energy by block.

    Args:
        path: The PNG file.
        values: Singular values by module, largest first.
        blocks: The block of each module, in the order of the network.
        title: Title of the plot.
    """
    figure, left, right = _panels()
    names = list(dict.fromkeys(blocks.values()))
    palette = colormaps["viridis"]
    colors = {block: palette(number / max(1, len(names) - 1) * 0.9) for number, block in enumerate(names)}
    for module, row in values.items():
        left.plot(range(1, len(row) + 1), row, color=colors[blocks[module]], linewidth=0.6, alpha=0.5)
    for block in names:
        rows = [row for module, row in values.items() if blocks[module] == block]
        _draw_energy(right, rows, label=block, color=colors[block], linewidth=1.2)
    _draw_energy(right, list(values.values()), label="all modules", color="black", linewidth=2)
    left.set(title="singular values of each module", xlabel="index", ylabel="singular value")
    if any(value > 0 for row in values.values() for value in row):
        left.set_yscale("log")
    right.set(title="cumulative energy", xlabel="singular values kept", ylabel="fraction", ylim=(0, 1.02))
    for share in (0.5, 0.9, 0.99):
        right.axhline(share, color="0.8", linewidth=0.8, zorder=0)
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.2)
    right.legend(fontsize=7, loc="lower right")
    return _save(figure, path, title)


def _draw_energy(axes: Axes, rows: Sequence[Sequence[float]], **style: object) -> None:
    """Plots the fraction of the modules' energy that the largest singular values of each hold."""
    longest = max(map(len, rows))
    energies = [sum(row[n] ** 2 for row in rows if n < len(row)) for n in range(longest)]
    whole, shares = sum(energies) or 1.0, [0.0]
    for energy in energies:
        shares.append(shares[-1] + energy / whole)
    axes.plot(range(longest + 1), shares, **style)  # type: ignore[arg-type]
