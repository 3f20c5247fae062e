"""What an adapter keeps at smaller ranks, as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from sdlora.writing import write_file


def draw_rank_curve(
    path: Path,
    ranks: Sequence[int],
    losses: Sequence[float],
    shares: Mapping[str, Sequence[float]],
    *,
    without: float,
    best: int,
    title: str = "",
) -> Path:
    """Draws the held-out loss over the rank, and the shares of the whole adapter that each rank keeps.

    Args:
        path: The PNG file.
        ranks: From the smallest to that of the adapter.
        losses: At each.
        shares: Of what, and at each rank how much of it.
        without: The loss without the adapter.
        best: The advised rank.
        title: Written above.
    """
    figure = Figure(figsize=(10, 4), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    left.axhline(
        without, color="0.6", linestyle="--", linewidth=1, label=f"without the adapter: {without:.4f}"
    )
    left.plot(
        ranks, losses, "o-", color="tab:red", markersize=4, label=f"at rank {ranks[-1]}: {losses[-1]:.4f}"
    )
    for what, values in shares.items():
        right.plot(ranks, values, "o-", markersize=4, label=what)
    left.set(title="loss at fixed noise", ylabel="held-out loss")
    right.set(
        title="kept of the whole adapter",
        ylabel="share",
        ylim=(min(0.0, *map(min, shares.values())) - 0.03, 1.1),
    )
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(ranks), [str(rank) for rank in ranks])
        axes.set_xlabel("rank")
        axes.axvline(best, color="tab:green", linewidth=1, linestyle=":")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(f"{title}: rank {best} is enough" if title else f"rank {best} is enough", fontsize=10)
    # Without the library's version in it, the same numbers give the same bytes.
    metadata = {"Software": None}
    return write_file(path, lambda file: FigureCanvasAgg(figure).print_png(str(file), metadata=metadata))
