"""Picks from records."""

from __future__ import annotations

import pytest

from sdlora.data.records import spread


@pytest.mark.parametrize(
    ("count", "expected"), [(1, [0]), (2, [0, 9]), (4, [0, 3, 6, 9]), (10, [*range(10)]), (99, [*range(10)])]
)
def test_evenly_spaced_items(count, expected):
    """As many as there are, or as were asked for, from the first to the last."""
    assert spread(range(10), count) == expected
