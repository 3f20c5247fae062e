"""Intervals over images, and the digits that they leave."""

from __future__ import annotations

import numpy as np

from sdlora.evaluation.scores import Interval, mean_text, ratio_interval


def test_an_interval_covers_the_truth():
    """R-13: a 95 % interval misses the true ratio in about one of twenty sets of 20 images."""
    random = np.random.default_rng(1)
    misses = 0
    for _ in range(300):
        wholes = random.normal(1.0, 0.2, 20)
        parts = 0.1 * wholes + random.normal(0, 0.1, 20)
        found = ratio_interval(parts.tolist(), wholes.tolist())
        assert found.low <= found.value <= found.high
        misses += not found.low <= 0.1 <= found.high
    # A percentile bootstrap is a little narrow for so few.
    assert 0.02 < misses / 300 < 0.12


def test_equal_twice_and_none_for_few():
    """R-12: no ambient randomness; below eight images there is none."""
    values = [float(number) for number in range(8)]
    assert ratio_interval(values, [1.0] * 8) == ratio_interval(values, [1.0] * 8)
    assert ratio_interval(values[:7], [1.0] * 7) is None


def test_digits():
    """R-13: as many as the interval bears."""
    assert str(Interval(-0.0481, -0.0612, -0.0343)).startswith("-5% ")
    assert str(Interval(-0.0481, -0.0484, -0.0478)).startswith("-4.81% ")
    assert str(Interval(1.0, 1.0, 1.0)).startswith("100% ")
    assert mean_text([0.26388, 0.3]) == "0.28"
    assert mean_text([0.2 + 0.02 * number for number in range(8)]) == "0.27"
    assert mean_text([0.27012 + 0.0001 * number for number in range(8)]) == "0.2705"
