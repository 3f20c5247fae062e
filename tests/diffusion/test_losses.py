"""Huber's losses against hand-computed values and torch's own (R-32)."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from sdlora.config import ObjectiveSection
from sdlora.diffusion.schedule import NoiseSchedule
from sdlora.objectives import LOSSES, huber_delta

SCHEDULE = NoiseSchedule(torch.tensor([1.0, 0.8, 0.5, 0.2, 0.0]), "epsilon")


def losses_of(error: torch.Tensor, loss: str, delta: float) -> torch.Tensor:
    given = {"huber_delta": delta, "huber_schedule": "constant"} if LOSSES[loss].parameters else {}
    settings = ObjectiveSection(loss=loss, **given)
    entry, errors = LOSSES[loss], error.view(1, 1, 1, -1)
    return entry.function(errors, SCHEDULE, torch.tensor([2]), **settings.parameters(entry)).flatten()


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        # δ = 0.5 at e = 0, 0.5, -2.
        ("mse", [0.0, 0.25, 4.0]),
        ("l1", [0.0, 0.5, 2.0]),
        ("huber", [0.0, 0.25, 0.5 * (4 - 0.5)]),
        ("pseudo_huber", [0.0, 1 * (math.sqrt(0.5) - 0.5), 1 * (math.sqrt(4.25) - 0.5)]),
        ("smooth_l1", [0.0, 2 * (math.sqrt(0.5) - 0.5), 2 * (math.sqrt(4.25) - 0.5)]),
    ],
)
def test_by_hand(loss, expected):
    """R-32: each formula, in float64."""
    error = torch.tensor([0.0, 0.5, -2.0], dtype=torch.float64)
    torch.testing.assert_close(losses_of(error, loss, 0.5), torch.tensor(expected, dtype=torch.float64))


def test_against_torch():
    """Twice torch's Huber loss, so that small errors count as squared ones do."""
    error = torch.linspace(-3, 3, 61)
    theirs = functional.huber_loss(error, torch.zeros(61), reduction="none", delta=0.7)
    torch.testing.assert_close(losses_of(error, "huber", 0.7), 2 * theirs)


@pytest.mark.parametrize("loss", ["huber", "pseudo_huber"])
def test_small_errors_are_squared(loss):
    """The learning rate keeps its meaning, also where √(e² + δ²) - δ would be lost in float32."""
    error = torch.tensor([1e-4, -3e-5])
    torch.testing.assert_close(losses_of(error, loss, 0.5), error.square(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.2] * 5),
        # 0.2^(t / 5)
        ("exponential", [1.0, 0.7247797, 0.5253056, 0.3807308, 0.2759459]),
        # 0.2 + 0.8 / (1 + σ)² with σ = 0, 0.5, 1, 2, ∞
        ("snr", [1.0, 0.2 + 0.8 / 2.25, 0.4, 0.2 + 0.8 / 9, 0.2]),
    ],
)
def test_delta_by_hand(schedule, expected):
    """R-32: δ falls from 1 without noise to `huber_delta` in noise; finite at SNR = 0 and ∞."""
    delta = huber_delta(torch.zeros(1), SCHEDULE, torch.arange(5), 0.2, schedule)
    torch.testing.assert_close(delta.flatten(), torch.tensor(expected))
