"""Bootstrap intervals over images: whether a difference is one, and the digits that a mean bears."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, log10

import numpy as np

from sdlora.report.summary import MIN_IMAGES

NUM_DRAWS, TAIL = 4000, 2.5


@dataclass(frozen=True, slots=True)
class Interval:
    """A number and its 95 % interval over images."""

    value: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether the number differs from zero."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        width = 100 * (self.high - self.low) / 2
        digits = min(max(_digits(width), 0), 2) if width else 0
        return f"{self.value:.{digits}%} (95% interval {self.low:.{digits}%} to {self.high:.{digits}%})"


def ratio_interval(parts: Sequence[float], wholes: Sequence[float]) -> Interval | None:
    """The ratio of two sums over the same images, by a percentile bootstrap; None below `MIN_IMAGES`.

    Both sums are drawn from the same images, so what an image adds to both does not widen the interval.
    """
    if len(parts) < MIN_IMAGES:
        return None
    above, below = _draw_sums(parts, wholes)
    low, high = np.percentile(above / np.where(below == 0, np.nan, below), [TAIL, 100 - TAIL])
    return Interval(sum(parts) / sum(wholes), float(low), float(high))


def mean_text(values: Sequence[float]) -> str:
    """The mean, with the digits that its interval bears; two of them below `MIN_IMAGES`."""
    mean = sum(values) / len(values)
    if len(values) < MIN_IMAGES:
        return f"{mean:.2g}"
    low, high = np.percentile(_draw_sums(values)[0] / len(values), [TAIL, 100 - TAIL])
    return f"{mean:.{min(max(_digits((high - low) / 2), 0), 4)}f}"


def _draw_sums(*rows: Sequence[float]) -> np.ndarray:
    """Sums over images that are drawn with replacement, the same ones for each row, (rows, NUM_DRAWS)."""
    count = len(rows[0])
    drawn = np.random.default_rng(0).integers(count, size=(NUM_DRAWS, count))
    return np.stack([np.asarray(row)[drawn].sum(axis=1) for row in rows])


def _digits(half_width: float) -> int:
    """Decimals up to the first digit of a half-width that is not zero."""
    return ceil(-log10(half_width)) if half_width > 0 else 4
