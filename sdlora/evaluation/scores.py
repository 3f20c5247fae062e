"""Scores of images that adapters draw, with bootstrap intervals, and the digits that these leave.

N rows (prompt, seed) prompt by prompt, P prompts, S seeds, B bootstrap draws, D numbers of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil, log10

import numpy as np
from PIL import Image

from sdlora.evaluation.features import Features, Rows, copies_of, thumbnails, unit_rows
from sdlora.report.summary import MIN_IMAGES

NUM_DRAWS, TAIL = 4000, 2.5
SAME_IMAGE = 0.01
# Share of the distance to any other image at which an image is a copy, a ratio as in arXiv 2301.13188.
NEARER = 0.5
MIN_STYLE_ACCURACY, MIN_CONTENT_ACCURACY = 0.75, 0.5


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

    @property
    def percent(self) -> str:
        """The number alone, as its interval allows: to the percent, or to the next ten."""
        step = 0.1 if self.high - self.low > 0.1 else 0.01
        return f"{round(self.value / step) * step:.0%}"

    def __str__(self) -> str:
        width = 100 * (self.high - self.low) / 2
        digits = min(max(_digits(width), 0), 2) if width else 0
        return f"{self.value:.{digits}%} (95% interval {self.low:.{digits}%} to {self.high:.{digits}%})"


@dataclass(frozen=True)
class Score:
    """A score: its value, and that of each bootstrap draw, (B,); draws of all scores are paired."""

    value: float
    draws: Rows = field(repr=False)

    @property
    def interval(self) -> Interval:
        low, high = np.percentile(self.draws, [TAIL, 100 - TAIL])
        return Interval(self.value, float(low), float(high))

    def __str__(self) -> str:
        return self.interval.percent

    def __sub__(self, other: Score) -> Score:
        return Score(self.value - other.value, self.draws - other.draws)


@dataclass(frozen=True)
class BootstrapWeights:
    """Weights of rows, that sum to 1: equal ones first, then those of each bootstrap draw, (1 + B, N).

    Prompts are drawn with replacement, and then the seeds of each.
    """

    rows: Rows = field(repr=False)
    num_prompts: int

    @classmethod
    def draw(cls, num_prompts: int, num_seeds: int, num_draws: int = NUM_DRAWS) -> BootstrapWeights:
        random = np.random.default_rng(0)
        prompts = random.integers(num_prompts, size=(num_draws, num_prompts, 1))
        seeds = random.integers(num_seeds, size=(num_draws, num_prompts, num_seeds))
        counts = np.ones((1 + num_draws, num_prompts * num_seeds))
        counts[1:] = 0
        draws = np.arange(1, 1 + num_draws)[:, None, None]
        np.add.at(counts, (np.broadcast_to(draws, seeds.shape), prompts * num_seeds + seeds), 1)
        return cls(counts / counts.sum(axis=1, keepdims=True), num_prompts)

    def mean(self, values: Rows) -> Score:
        means = self.rows @ values
        return Score(float(means[0]), means[1:])

    def length(self, rows: Rows, noise: float = 0.0) -> Rows:
        """The length of the mean of rows (N, D), for each weighting, (1 + B,).

        A mean of few rows is longer than that of many; what their spread over prompts, and `noise`, add to
        its square is taken off, so that two sets of one kind are at a distance of about 0.
        """
        squared = np.square(self.rows @ rows).sum(axis=1) - noise
        if self.num_prompts > 1:
            prompts = rows.reshape(self.num_prompts, -1, rows.shape[1]).mean(axis=1)
            spread = prompts.var(axis=0, ddof=1).sum() / self.num_prompts
            # A draw varies around a mean that itself varies.
            squared -= spread * np.r_[1, np.full(len(squared) - 1, 2.0)]
        result: Rows = np.sqrt(np.maximum(squared, 0))
        return result


class Reference:
    """Real images of the set, and how far images are from them in style.

    Args:
        features: The features.
        images: Held-out images; or, if there are too few, training images, and each row is compared without
            the one that is most like it, which it may have copied.
        leave_one_out: Whether they are training images.
    """

    def __init__(self, features: Features, images: Sequence[Image.Image], *, leave_one_out: bool) -> None:
        self.features, self.leave_one_out = features, leave_one_out
        self.rows = features.style(images)
        self.thumbnails = thumbnails(images)
        count = len(images)
        self.noise = float(self.rows.var(axis=0, ddof=1).sum() / count) if count > 1 else 0.0

    def offsets(self, images: Sequence[Image.Image], style: Rows | None = None) -> Rows:
        """Style of images less that of the set, (N, D); `style` is what the features say, if it is known."""
        style = self.features.style(images) if style is None else style
        total, count = self.rows.sum(axis=0), len(self.rows)
        if not self.leave_one_out or count < 2:
            whole: Rows = style - total / count
            return whole
        nearest = _distances(thumbnails(images), self.thumbnails).argmin(axis=1)
        offsets: Rows = style - (total - self.rows[nearest]) / (count - 1)
        return offsets


@dataclass(frozen=True)
class Accuracy:
    """How often features are right where the truth is known, which a recommendation rests on.

    Args:
        style: Share of the set's real images and of the base's own that are nearer in style to the others of
            their kind than to the other kind; 0.5 is chance.
        content: Share of the base's images that are most like one of the same prompt, by another seed; None
            with a single seed.
    """

    style: float
    content: float | None

    @classmethod
    def measure(cls, real: Rows, style: Rows, content: Rows, num_prompts: int) -> Accuracy:
        """By the style of the set's images, and style and content of the base's in the order of the rows."""
        right = (_share_nearer(real, style) + _share_nearer(style, real)) / 2
        num_seeds = len(content) // num_prompts
        if num_seeds < 2:
            return cls(right, None)
        own = unit_rows(content - content.mean(axis=0))
        likeness = own @ own.T
        np.fill_diagonal(likeness, -np.inf)
        prompts = np.arange(len(content)) // num_seeds
        return cls(right, float((prompts[likeness.argmax(axis=1)] == prompts).mean()))

    @property
    def problem(self) -> str:
        """What features that are too often wrong cannot tell; empty for others."""
        if self.style < MIN_STYLE_ACCURACY:
            return f"tell the set's images from the base's in only {self.style:.0%} of cases (chance: 50%)"
        if self.content is not None and self.content < MIN_CONTENT_ACCURACY:
            return f"are right about what the base's images show in only {self.content:.0%} of cases"
        return ""

    def __str__(self) -> str:
        style = f"{self.style:.0%} of images by style"
        return style if self.content is None else f"{style}, {self.content:.0%} by content"


def _share_nearer(rows: Rows, others: Rows) -> float:
    """The share of rows that are nearer to the mean of the other rows than to that of `others`."""
    if len(rows) < 2:
        return 0.5
    rest = (rows.sum(axis=0) - rows) / (len(rows) - 1)
    away = np.linalg.norm(rows - others.mean(axis=0), axis=1)
    return float((np.linalg.norm(rows - rest, axis=1) < away).mean())


def style_gain(weights: BootstrapWeights, reference: Reference, base: Rows, cell: Rows) -> Score:
    """The way from the base's own images (0) to real images of the set (1); below 0, it leads away.

    `base` and `cell` are offsets (N, D) of the same rows.
    """
    before, after = weights.length(base, reference.noise), weights.length(cell, reference.noise)
    gain = 1 - after / np.maximum(before, 1e-9)
    return Score(float(gain[0]), gain[1:])


def content_kept(features: Features, base: Rows, cell: Rows, num_prompts: int) -> Rows:
    """How well each row shows what the base shows for the same prompt and seed, (N,): 1 as well, 0 not.

    The cosine, of what images show less what all of the base's images share, on the scale of the features;
    without one, images of the base for the same prompt and another seed are at 1.
    """
    center = base.mean(axis=0)
    own, new = unit_rows(base - center), unit_rows(cell - center)
    low, high = features.content_scale or (0.0, _seed_likeness(own, num_prompts))
    result: Rows = np.clip(((own * new).sum(axis=1) - low) / (high - low), 0, 1)
    return result


def _seed_likeness(unit: Rows, num_prompts: int) -> float:
    """The mean cosine of two of the base's images for one prompt; 1 with a single seed."""
    prompts = unit.reshape(num_prompts, -1, unit.shape[1])
    count = prompts.shape[1]
    if count < 2:
        return 1.0
    pairs = (np.square(prompts.sum(axis=1)).sum(axis=1) - count) / (count * (count - 1))
    return max(float(pairs.mean()), 0.1)


def diversity(weights: BootstrapWeights, base: Rows, cell: Rows) -> Score:
    """The mean distance between rows by what they show, over that of the base's."""
    before, after = (_spread(weights, unit_rows(rows)) for rows in (base, cell))
    ratio = after / np.maximum(before, 1e-9)
    return Score(float(ratio[0]), ratio[1:])


def _spread(weights: BootstrapWeights, rows: Rows) -> Rows:
    # The mean over pairs of 1 - cosine, without pairs of a row with itself.
    same = np.square(weights.rows).sum(axis=1)
    result: Rows = (1 - np.square(weights.rows @ rows).sum(axis=1)) / np.maximum(1 - same, 1e-9)
    return result


class CopyCheck:
    """Tells copies of training images, also mirrored or cut, from new images.

    A copy is closer to a training image than the two training images that are most alike, and half as far
    from it as from any other: simple shapes are near to several images.
    """

    def __init__(self, images: Sequence[Image.Image]) -> None:
        self.known = thumbnails([copy for image in images for copy in copies_of(image)])
        own = thumbnails(images)
        pairs = _distances(own, self.known).reshape(len(own), len(own), -1).min(axis=2)
        # Duplicates in the folder are no two images.
        self.same = (pairs < SAME_IMAGE) | np.eye(len(own), dtype=bool)
        self.closest = float(pairs[~self.same].min(initial=np.inf))

    def copied(self, images: Sequence[Image.Image], base: Sequence[Image.Image] = ()) -> Rows:
        """1 for each copy, else 0, (N,); an image to which the base's own is as close is none."""
        if not np.isfinite(self.closest):
            return np.zeros(len(images))
        result = self._is_close(images)
        return result * (1 - self._is_close(base)) if base else result

    def _is_close(self, images: Sequence[Image.Image]) -> Rows:
        distances = (
            _distances(thumbnails(images), self.known).reshape(len(images), len(self.same), -1).min(axis=2)
        )
        others = np.where(self.same[distances.argmin(axis=1)], np.inf, distances).min(axis=1)
        result: Rows = (distances.min(axis=1) < np.minimum(self.closest, NEARER * others)).astype(np.float64)
        return result


def _distances(rows: Rows, others: Rows) -> Rows:
    """Root mean square differences, (N, M)."""
    squared = np.square(rows).sum(axis=1)[:, None] + np.square(others).sum(axis=1) - 2 * rows @ others.T
    result: Rows = np.sqrt(np.maximum(squared, 0) / rows.shape[1])
    return result


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
