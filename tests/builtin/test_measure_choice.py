"""The comparison of a recommended cell with the best one, by hand-made truths."""

from __future__ import annotations

import numpy as np
import pytest

from sdlora.builtin.measure_choice import compare_with_best, concept_of
from sdlora.evaluation.scores import Score

TRUTH = {
    (100, 1.0): Score(0.2, np.array([0.1, 0.3])),
    (200, 0.6): Score(0.4, np.array([0.4, 0.4])),
    ("final", 0.8): Score(0.3, np.array([0.5, 0.1])),
}


def test_share_of_the_best_and_whether_draws_tell_the_two_apart() -> None:
    row = compare_with_best(TRUTH, (100, 1.0))
    assert row["best"] == [200, 0.6]
    assert row["share"] == pytest.approx(0.5)
    # Draws of 0.25 and 0.75, of which all but 2.5 % at either end.
    assert row["interval"] == pytest.approx([0.2625, 0.7375], abs=1e-3)
    assert row["is_worse"]
    assert not compare_with_best(TRUTH, ("final", 0.8))["is_worse"]
    assert row["truth"] == {"100 at 1": 0.2, "200 at 0.6": 0.4, "final at 0.8": 0.3}


def test_best_cell_of_a_run_without_recommendation() -> None:
    row = compare_with_best(TRUTH, (None, None))
    assert row["best_truth"] == 0.4
    assert "share" not in row


@pytest.mark.parametrize(
    ("prompt", "trigger", "concept"),
    [("line art, a fire engine", "line art", "fire-engine"), ("an octopus", None, "octopus")],
)
def test_concept_of_a_prompt(prompt: str, trigger: str | None, concept: str) -> None:
    assert concept_of(prompt, trigger) == concept
