"""Numbers that stop a run (R-06, R-09)."""

from __future__ import annotations

import math

import pytest
import torch

from sdlora.errors import TrainingDiverged
from sdlora.lora.adapter import Adapter, LowRank
from sdlora.training.guards import LossGuard, check_dead_modules, check_parameters, find_dead_modules


def check(guard: LossGuard, step: int, loss: float, norm: float = 1.0) -> bool:
    return guard.check(step, loss, norm, 1e-4, ["cat.png", "dog.png"], "the last good checkpoint is X")


def test_bad_steps_are_skipped_and_counted():
    """R-06: a loss or a gradient that is not finite skips the update."""
    guard = LossGuard(max_skipped=3)
    assert check(guard, 1, 0.5)
    assert not check(guard, 2, math.nan)
    assert not check(guard, 3, 0.5, math.inf)
    assert check(guard, 4, 0.5)
    assert (guard.skipped, guard.skipped_in_row) == (2, 0)


def test_bad_steps_in_a_row_stop():
    """R-06: with the step, the images, the rate and the last good checkpoint."""
    guard = LossGuard(max_skipped=3)
    check(guard, 1, math.nan)
    check(guard, 2, math.nan)
    with pytest.raises(TrainingDiverged, match="step 3") as caught:
        check(guard, 3, math.nan)
    for part in ("cat.png, dog.png", "0.0001", "the last good checkpoint is X", "for 3 steps in a row"):
        assert part in str(caught.value)
    assert caught.value.exit_code == 1


def test_a_loss_of_zero_stops():
    """R-06: nothing is learnt from a loss of exactly 0."""
    guard = LossGuard(max_skipped=3)
    for step in range(4):
        assert check(guard, step, 0.0)
    with pytest.raises(TrainingDiverged, match="exactly 0"):
        check(guard, 5, 0.0)


def make_adapter(**ups: float) -> Adapter:
    modules = {
        name.replace("__", "."): LowRank(torch.ones(1, 2), torch.full((2, 1), up)) for name, up in ups.items()
    }
    return Adapter(modules, 1, 1.0)


def test_parameters_that_are_not_finite_stop():
    """R-06: named by module, before anything is written."""
    check_parameters(make_adapter(a=1.0), 3, "")
    with pytest.raises(TrainingDiverged, match=r"step 3 \(b"):
        check_parameters(make_adapter(a=1.0, b=math.nan), 3, "")


def test_dead_modules_are_named():
    """R-09: each up-matrix must change in the first update."""
    adapter = make_adapter(a=0.0, b=1.0)
    dead = find_dead_modules(adapter, [torch.zeros(2, 1), torch.zeros(2, 1)])
    assert dead == ["a"]
    with pytest.raises(TrainingDiverged, match="1 modules did not change in the first step: a"):
        check_dead_modules(dead, is_single_token=False)


def test_a_single_token_is_excused():
    """R-09: queries and keys of self-attention over one token cannot learn; all else must."""
    names = ["mid.attn1.to_q", "mid.attn1.to_k"]
    assert check_dead_modules(names, is_single_token=True) == names
    with pytest.raises(TrainingDiverged, match="2 modules"):
        check_dead_modules(names, is_single_token=False)
    with pytest.raises(TrainingDiverged, match=r"1 modules .*mid\.attn2\.to_q"):
        check_dead_modules([*names, "mid.attn2.to_q"], is_single_token=True)
