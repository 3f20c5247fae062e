"""The learning rate is a pure function of the step; optimizers come by import path (R-08)."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers.optimization import get_scheduler

from sdlora.config import TrainSection, load_config
from sdlora.data.batches import split_micro_batches
from sdlora.errors import ConfigError
from sdlora.training.optimizer import (
    ParameterGroup,
    build_optimizer,
    check_optimizer,
    learning_rate,
    num_warmup_steps,
)
from tests.checks import raises


def groups_of(*ratios: float) -> list[ParameterGroup]:
    return [ParameterGroup(str(ratio), ratio, [torch.nn.Parameter(torch.ones(2))]) for ratio in ratios]


def settings(**values) -> TrainSection:
    return TrainSection(**{"learning_rate": 0.1, "warmup": 0.1, **values})


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", lambda progress: 1.0),
        ("linear", lambda progress: 1 - progress),
        ("cosine", lambda progress: (1 + math.cos(math.pi * progress)) / 2),
    ],
)
def test_schedules_by_hand(schedule, expected):
    """R-08: a linear rise over the warm-up, then the schedule up to the last step."""
    steps = 50
    rates = [learning_rate(step, settings(schedule=schedule), steps) for step in range(steps)]
    assert rates[:5] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1])
    for step in range(5, steps):
        assert rates[step] == pytest.approx(0.1 * expected((step - 5) / 45))
    assert all(rate > 0 for rate in rates)


@pytest.mark.parametrize(
    ("schedule", "options"),
    [
        ("constant", {}),
        ("linear", {}),
        ("cosine", {}),
        ("cosine_with_restarts", {"cycles": 3}),
        ("polynomial", {"power": 2.0}),
        ("polynomial", {}),
    ],
)
def test_schedules_are_those_of_diffusers(schedule, options):
    """R-08: the formulas of `get_scheduler`, but for the warm-up, whose first step is not without effect."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    theirs = {"num_cycles" if name == "cycles" else name: value for name, value in options.items()}
    scheduler = get_scheduler(
        schedule,
        optimizer,
        num_warmup_steps=0,
        num_training_steps=40,
        **{"num_cycles": 1, "power": 1.0, **theirs},
    )
    own = settings(
        schedule=schedule, warmup=0, **{f"schedule_{name}": value for name, value in options.items()}
    )
    for step in range(40):
        assert learning_rate(step, own, 40) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9), step
        optimizer.step()
        scheduler.step()


def test_options_of_schedules_have_an_effect():
    """R-25: a number of cycles without restarts is a mistake."""
    for key, other in (("cycles", "cosine"), ("power", "linear")):
        with raises(ConfigError, f"train.schedule_{key}", shows=other):
            load_config(None, {f"train.schedule_{key}": 2, "train.schedule": other})


@pytest.mark.parametrize("num_processes", [1, 2, 4])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_processes_and_accumulation_do_not_move_it(num_processes, accumulate):
    """R-08: the rate at step k depends on k alone, not on micro-batches or processes."""
    global_batch = 2 * accumulate * num_processes
    logged = []
    for step in range(20):
        micro_batches = split_micro_batches(
            list(range(global_batch)), batch_size=2, process_index=0, num_processes=num_processes
        )
        assert len(micro_batches) == accumulate
        logged.append(learning_rate(step, settings(schedule="cosine"), 20))
    assert logged == [learning_rate(step, settings(schedule="cosine"), 20) for step in range(20)]
    assert logged[-1] < 0.01 * logged[2]


def test_warmup_is_a_share_or_a_number():
    """DESIGN 2: a share of the steps below 1, else a number of steps."""
    assert num_warmup_steps(0.05, 200) == 10
    assert num_warmup_steps(7, 200) == 7
    assert num_warmup_steps(300, 200) == 200
    assert num_warmup_steps(0, 200) == 0


def test_any_optimizer_by_import_path():
    """Prodigy, 8-bit AdamW or Lion need only their class and its arguments."""
    optimizer = build_optimizer(
        settings(optimizer="torch.optim.SGD", optimizer_args={"momentum": 0.5}), groups_of(1.0, 0.5)
    )
    assert type(optimizer) is torch.optim.SGD
    assert optimizer.param_groups[0]["momentum"] == 0.5
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.05]
    assert type(build_optimizer(settings(), groups_of(1.0))) is torch.optim.AdamW


MATRICES = {"mid_block.to_q.down": 2, "mid_block.to_q.up": 2}


@pytest.mark.parametrize(
    ("values", "key", "shows"),
    [
        ({"optimizer": "adamx"}, "train.optimizer", ("= adamx", "adamw")),
        ({"optimizer": "torch.optim.Adamx"}, "train.optimizer", "torch.optim has no Adamx"),
        ({"optimizer": "nowhere.Lion"}, "train.optimizer", "pip install nowhere"),
        ({"optimizer": "torch.nn.Linear"}, "train.optimizer", "torch.optim.Optimizer"),
        ({"optimizer": "torch.optim.LBFGS"}, "train.optimizer", "several times"),
        ({"optimizer_args": {"lr": 1}}, "train.optimizer_args", "train.learning_rate"),
        ({"optimizer_args": {"betaz": 1}}, "train.optimizer_args", "betaz"),
    ],
)
def test_wrong_optimizers(values, key, shows):
    """One line that names the setting."""
    with raises(ConfigError, key, shows=shows):
        check_optimizer(settings(**values), MATRICES)


def test_an_optimizer_of_matrices():
    """R-35: Muon takes nothing else, and most adapters are nothing else."""
    asked = settings(optimizer="torch.optim.Muon")
    check_optimizer(asked, MATRICES)
    with raises(ConfigError, "train.optimizer", shows=("Muon", "adamw")):
        check_optimizer(asked, {**MATRICES, "mid_block.to_q.magnitude": 1})


def test_an_optimizer_that_finds_its_own_rate(monkeypatch):
    """Prodigy keeps one estimate `d` for all: one group works, several are refused before the first step."""

    class OneRate(torch.optim.SGD):
        def __init__(self, params, lr):
            super().__init__(params, lr)
            for group in self.param_groups:
                group["d"] = 1e-6

    monkeypatch.setattr(torch.optim, "OneRate", OneRate, raising=False)
    asked = settings(optimizer="torch.optim.OneRate")
    check_optimizer(asked, MATRICES)
    with raises(ConfigError, "train.optimizer", shows=("OneRate", "train.lora_plus_ratio")):
        check_optimizer(asked.model_copy(update={"lora_plus_ratio": 2.0}), MATRICES)
