"""Numbers that stop a run (R-06, R-09)."""

from __future__ import annotations

import json
import math
import random
from dataclasses import asdict

import pytest
import torch

from sdlora.errors import TrainingDiverged
from sdlora.lora.adapter import Adapter
from sdlora.lora.kinds import LowRank
from sdlora.training.health import (
    Counters,
    RunningStats,
    check_counters,
    check_dead_modules,
    check_parameters,
    copy_starts,
    find_dead_modules,
)
from sdlora.training.step import Gradient


def check(counters: Counters, loss: float, norm: float = 1.0) -> bool:
    is_good = Gradient(loss, norm, ()).is_finite
    counters.count(loss, norm, is_good=is_good)
    check_counters(counters, 3, "step 3, images cat.png; the last good checkpoint is X")
    return is_good


def test_bad_steps_are_skipped_and_counted():
    """R-06: a loss or a gradient that is not finite skips the update."""
    counters = Counters()
    assert [check(counters, *step) for step in ((0.5,), (math.nan,), (0.5, math.inf), (0.5,))] == [
        True,
        False,
        False,
        True,
    ]
    assert (counters.skipped, counters.skipped_in_row) == (2, 0)


def test_the_running_mean_is_not_its_first_value():
    """R-45: after few steps it is their mean, later that of about the last 50."""
    counters = Counters()
    for loss in (0.9, 0.1, 0.2, math.nan, 0.4):
        counters.count(loss, 1.0, is_good=True)
    assert counters.loss_ema == pytest.approx(0.4)
    for _ in range(200):
        counters.count(0.1, 1.0, is_good=True)
    assert counters.loss_ema == pytest.approx(0.1, abs=0.01)


def test_bad_steps_in_a_row_stop():
    """R-06: with the step, the images and the last good checkpoint."""
    counters = Counters()
    check(counters, math.nan)
    check(counters, math.nan)
    with pytest.raises(TrainingDiverged, match="not finite for 3 steps in a row") as caught:
        check(counters, math.nan)
    assert "(step 3, images cat.png; the last good checkpoint is X)" in str(caught.value)
    assert caught.value.exit_code == 1


def test_a_loss_of_zero_stops():
    """R-06: nothing is learnt from a loss of exactly 0."""
    counters = Counters()
    for _ in range(4):
        assert check(counters, 0.0)
    with pytest.raises(TrainingDiverged, match="exactly 0"):
        check(counters, 0.0)


def test_what_is_far():
    """A spike is told by the run's own distribution, whatever its scale; ordinary draws never are."""
    draws = random.Random(0)
    for width in (0.01, 0.5, 1.5):
        spread = RunningStats()
        ordinary = [0.3 * math.exp(draws.gauss(0, width)) for _ in range(2000)]
        assert not any(spread.take(value) for value in ordinary)
        assert spread.mean == pytest.approx(math.log(0.3), abs=width / 2)
        assert spread.take(0.3 * math.exp(12 * max(width, 0.1)))
        assert not spread.take(0.3)
    assert not RunningStats().take(1e9), "nothing is known yet"
    assert not any(spread.take(value) for value in (0.0, math.nan, math.inf)), "other guards tell those"


def test_counters_survive_json():
    """R-03: whatever a run has counted comes back with its checkpoint."""
    counters = Counters()
    for step in range(40):
        counters.count(0.1 + step / 100, math.inf if step == 5 else 2.0, is_good=step != 5)
    assert Counters.restore(json.loads(json.dumps(asdict(counters)))) == counters


def make_adapter(**ups: float) -> Adapter:
    modules = {
        name.replace("__", "."): LowRank(torch.ones(1, 2), torch.full((2, 1), up)) for name, up in ups.items()
    }
    return Adapter(modules, 1, 1.0)


def test_parameters_that_are_not_finite_stop():
    """R-06: named by module, before anything is written."""
    check_parameters(make_adapter(a=1.0), "")
    with pytest.raises(TrainingDiverged, match=r"1 modules .* such as b; .*\(step 3\)"):
        check_parameters(make_adapter(a=1.0, b=math.nan), "step 3")


def test_dead_modules_are_named():
    """R-09: each up-matrix must change in the first update."""
    adapter = make_adapter(a=0.0, b=1.0)
    before = copy_starts(adapter)
    adapter.modules["b"].up += 1
    dead = find_dead_modules(adapter, before)
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
