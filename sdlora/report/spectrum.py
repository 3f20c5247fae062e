"""The singular values of an adapter as a picture: how many directions hold how much of what was learnt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sdlora.writing import write_file

Values = Mapping[str, Sequence[float]]


def draw_spectrum(path: Path, values: Values, blocks: Mapping[str, str], *, title: str = "") -> Path:
    """Draws every module's singular values, and the energy that the first directions hold, by block.

    Args:
        path: The PNG file.
        values: Singular values by module, largest first.
        blocks: The block of each module, in the order of the network.
        title: Written above.
    """
    figure = Figure(figsize=(10, 4), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    names = list(dict.fromkeys(blocks.values()))
    palette = colormaps["viridis"]
    colours = {block: palette(number / max(1, len(names) - 1) * 0.9) for number, block in enumerate(names)}
    for module, row in values.items():
        left.plot(range(1, len(row) + 1), row, color=colours[blocks[module]], linewidth=0.6, alpha=0.5)
    for block in names:
        rows = [row for module, row in values.items() if blocks[module] == block]
        _draw_energy(right, rows, label=block, color=colours[block], linewidth=1.2)
    _draw_energy(right, list(values.values()), label="all modules", color="black", linewidth=2)
    left.set(title="singular values of each module", xlabel="direction", ylabel="singular value")
    if any(value > 0 for row in values.values() for value in row):
        left.set_yscale("log")
    right.set(
        title="energy in the first directions", xlabel="directions kept", ylabel="share", ylim=(0, 1.02)
    )
    for share in (0.5, 0.9, 0.99):
        right.axhline(share, color="0.8", linewidth=0.8, zorder=0)
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.2)
    right.legend(fontsize=7, loc="lower right")
    figure.suptitle(title, fontsize=10)
    # Without the library's version in it, the same adapter gives the same bytes.
    metadata = {"Software": None}
    return write_file(path, lambda file: FigureCanvasAgg(figure).print_png(str(file), metadata=metadata))


def _draw_energy(axes: Axes, rows: Sequence[Sequence[float]], **style: object) -> None:
    """The share of the modules' whole energy that is in the first directions of each."""
    longest = max(map(len, rows))
    energies = [sum(row[n] ** 2 for row in rows if n < len(row)) for n in range(longest)]
    whole, shares = sum(energies) or 1.0, [0.0]
    for energy in energies:
        shares.append(shares[-1] + energy / whole)
    axes.plot(range(longest + 1), shares, **style)  # type: ignore[arg-type]
