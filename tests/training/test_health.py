"""Numbers that stop a run (R-06, R-09)."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

from sdlora.config import load_config
from sdlora.errors import TrainingDiverged
from sdlora.lora.adapter import Adapter
from sdlora.lora.kinds import LowRank
from sdlora.runs import RunFolder
from sdlora.training.health import Counters, Health, check_dead_modules
from sdlora.training.step import StepResult
from tests.checks import raises


def make_result(step: int, loss: float, norm: float = 1.0) -> StepResult:
    return StepResult(
        step=step,
        loss=loss,
        learning_rate=1e-3,
        grad_norm=norm,
        updated=math.isfinite(loss) and math.isfinite(norm),
        images=("cat.png",),
        draws=(),
        rates={},
    )


def count(counters: Counters, *losses: float) -> None:
    for loss in losses:
        counters.count(make_result(counters.step + 1, loss))


@pytest.fixture
def make_health(tmp_path):
    """Health checks of an adapter, of a run with a checkpoint at step 2, proven from step 100 on."""

    def make(adapter: Adapter, first_update_step: int = 100) -> Health:
        run = RunFolder(tmp_path / "run")
        run.checkpoint(2).mkdir(parents=True, exist_ok=True)
        plan = SimpleNamespace(
            first_update_step=lambda start=0: max(start, first_update_step),
            config=load_config(None, {"train.max_skipped_steps": 3}),
        )
        return Health(run, plan, adapter, warn=lambda message, **values: None)

    return make


def test_bad_steps_are_skipped_and_counted():
    """R-06: a loss or a gradient that is not finite skips the update."""
    counters = Counters()
    for step, (loss, norm) in enumerate([(0.5, 1), (math.nan, 1), (0.5, math.inf), (0.5, 1)], 1):
        counters.count(make_result(step, loss, norm))
    assert (counters.step, counters.images_seen) == (4, 4)
    assert (counters.skipped, counters.skipped_in_row) == (2, 0)


def test_the_running_mean_is_not_its_first_value():
    """R-45: the mean of all losses at first, later of about the last 50."""
    counters = Counters()
    count(counters, 0.9, 0.1, 0.2, math.nan, 0.4)
    assert counters.loss_ema == pytest.approx(0.4)
    count(counters, *[0.1] * 200)
    assert counters.loss_ema == pytest.approx(0.1, abs=0.01)


def test_bad_steps_in_a_row_stop(make_health):
    """R-06: the error names the step, the images, the rate and the last good checkpoint."""
    health = make_health(make_adapter(a=1.0))
    for step, loss in enumerate((0.5, 0.5, math.nan, math.nan), 1):
        health.check(make_result(step, loss))
    shows = ("3 steps", "step 5", "cat.png", "0.001", str(health.run.checkpoint(2)))
    with raises(TrainingDiverged, "non-finite-steps", shows=shows) as caught:
        health.check(make_result(5, math.nan))
    assert caught.value.exit_code == 1


def test_a_loss_of_zero_stops(make_health):
    """R-06: nothing is learned from a loss of exactly 0."""
    health = make_health(make_adapter(a=1.0))
    for step in range(4):
        health.check(make_result(step + 1, 0.0))
    with raises(TrainingDiverged, "zero-loss"):
        health.check(make_result(5, 0.0))


def test_counters_survive_json():
    """R-03: all counters are restored from a checkpoint."""
    counters = Counters()
    for step in range(40):
        counters.count(make_result(step + 1, 0.1 + step / 100, math.inf if step == 5 else 2.0))
    values = json.loads(json.dumps(asdict(counters)))
    assert Counters.restore(values) == counters
    assert Counters.restore({**values, "losses": {"count": 40}}) == counters, "of an older version"


def make_adapter(**ups: float) -> Adapter:
    modules = {
        name.replace("__", "."): LowRank(torch.ones(1, 2), torch.full((2, 1), up)) for name, up in ups.items()
    }
    return Adapter(modules, 1, 1.0)


def test_parameters_that_are_not_finite_stop(make_health):
    """R-06: the modules are named before anything is written."""
    make_health(make_adapter(a=1.0)).check(make_result(3, 0.5))
    with raises(TrainingDiverged, "non-finite-parameters", shows=("1 modules", ": b;", "step 3")):
        make_health(make_adapter(a=1.0, b=math.nan)).check(make_result(3, 0.5))


def test_dead_modules_are_named(make_health):
    """R-09: each up-matrix must change in the first update."""
    adapter = make_adapter(a=0.0, b=1.0)
    health = make_health(adapter, first_update_step=0)
    health._has_single_token = lambda step: False
    assert health.checks_first_update
    adapter.modules["b"].up += 1
    with raises(TrainingDiverged, "dead-modules", shows=("1 modules", ": a;")):
        health.check(make_result(1, 0.5))


def test_the_first_update_is_proven_once(make_health):
    """R-09: a skipped step proves nothing; after the first update a step may leave modules unchanged."""
    adapter = make_adapter(a=0.0)
    health = make_health(adapter, first_update_step=0)
    health._has_single_token = lambda step: False
    health.check(make_result(1, math.nan))
    assert health.checks_first_update
    adapter.modules["a"].up += 1
    health.check(make_result(2, 0.5))
    assert not health.checks_first_update
    health.check(make_result(3, 0.5))


def test_a_later_update_is_proven(make_health):
    """R-09: the check waits for the first step with a caption."""
    health = make_health(make_adapter(a=0.0), first_update_step=2)
    health._has_single_token = lambda step: False
    for step in (1, 2):
        assert not health.checks_first_update
        health.check(make_result(step, 0.5))
    assert health.checks_first_update
    with raises(TrainingDiverged, "dead-modules", shows=": a;"):
        health.check(make_result(3, 0.5))


def test_the_proof_goes_on_after_a_resume(make_health):
    """R-03, R-09: the first steps were skipped, then the run was stopped; or the update has been proven."""
    health = make_health(make_adapter(a=0.0), first_update_step=0)
    health.restore(Counters(step=3, skipped=3))
    assert health.checks_first_update
    health.restore(Counters(step=3, skipped=2))
    assert not health.checks_first_update


def test_a_single_token_is_excused():
    """R-09: queries and keys of self-attention over one token cannot learn; all others must."""
    names = ["mid.attn1.to_q", "mid.attn1.to_k"]
    assert check_dead_modules(names, has_single_token=True) == names
    with raises(TrainingDiverged, "dead-modules", shows="2 modules"):
        check_dead_modules(names, has_single_token=False)
    with raises(TrainingDiverged, "dead-modules", shows=("1 modules", "mid.attn2.to_q")):
        check_dead_modules([*names, "mid.attn2.to_q"], has_single_token=True)
