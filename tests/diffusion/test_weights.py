"""Weights of the timesteps against hand-computed values (R-32)."""

from __future__ import annotations

import pytest
import torch

from sdlora.config import ObjectiveSection
from sdlora.diffusion.objective import debiased_weight, min_snr_weight, timestep_weight
from sdlora.diffusion.schedule import NoiseSchedule

# SNR at these is 9, 1 and 0.
ALPHA_BAR = torch.tensor([0.9, 0.5, 0.0])


@pytest.mark.parametrize(
    ("prediction_type", "expected"),
    [
        ("epsilon", [5 / 9, 1.0, 1.0]),
        ("v_prediction", [5 / 10, 1 / 2, 0.0]),
        ("sample", [5.0, 1.0, 0.0]),
    ],
)
def test_min_snr_by_hand(prediction_type, expected):
    """R-32: min(SNR, 5) in the right form for each target, finite at zero terminal SNR."""
    weight = min_snr_weight(NoiseSchedule(ALPHA_BAR, prediction_type), torch.tensor([0, 1, 2]), 5.0)
    torch.testing.assert_close(weight, torch.tensor(expected))


@pytest.mark.parametrize(
    ("prediction_type", "expected"),
    [
        # 1 / √SNR, √SNR / (SNR + 1), √SNR; at SNR = 0 that of 0.001.
        ("epsilon", [1 / 3, 1.0, 31.6227766]),
        ("v_prediction", [3 / 10, 1 / 2, 0.0316227766 / 1.001]),
        ("sample", [3.0, 1.0, 0.0316227766]),
    ],
)
def test_debiased_by_hand(prediction_type, expected):
    """R-32: 1 / √SNR of ε errors in the right form for each target, finite at zero terminal SNR."""
    weight = debiased_weight(NoiseSchedule(ALPHA_BAR, prediction_type), torch.tensor([0, 1, 2]))
    torch.testing.assert_close(weight, torch.tensor(expected))


@pytest.mark.parametrize("settings", [{"min_snr_gamma": 5.0}, {"debiased": True}], ids=str)
def test_three_targets_are_one_objective(settings):
    """R-32: an x_0 error e is an ε error of e √SNR and a v error of e √(SNR + 1): the losses are equal."""
    alpha_bar = torch.linspace(0.998, 0.002, 50)
    snr = alpha_bar / (1 - alpha_bar)
    epsilon, velocity, sample = (
        timestep_weight(NoiseSchedule(alpha_bar, kind), torch.arange(50), ObjectiveSection(**settings))
        for kind in ("epsilon", "v_prediction", "sample")
    )
    torch.testing.assert_close(epsilon * snr, sample, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(velocity * (snr + 1), sample, rtol=1e-4, atol=1e-6)


def test_no_weights_by_default():
    """All timesteps count alike unless asked."""
    schedule = NoiseSchedule(ALPHA_BAR, "epsilon")
    assert timestep_weight(schedule, torch.arange(3), ObjectiveSection()) is None
