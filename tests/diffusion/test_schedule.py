"""The forward process against diffusers' own schedulers and hand-computed values (R-32)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler

from sdlora.diffusion.schedule import NoiseSchedule, schedule_from_config
from sdlora.errors import ModelError

CONFIGS = [
    {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2"},
    {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "rescale_betas_zero_snr": True,
    },
]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_equals_diffusers(config, prediction_type):
    """R-32: ᾱ, noising and the v target are those of diffusers' DDPMScheduler."""
    theirs = DDPMScheduler(**config, prediction_type=prediction_type)
    ours = schedule_from_config(theirs.config)
    torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-4, atol=1e-6)
    latents, noise = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([0, 500, 999])
    torch.testing.assert_close(
        ours.add_noise(latents, noise, timesteps),
        theirs.add_noise(latents, noise, timesteps),
        rtol=1e-4,
        atol=1e-5,
    )
    if prediction_type == "v_prediction":
        velocity = theirs.get_velocity(latents, noise, timesteps)
        torch.testing.assert_close(ours.target(latents, noise, timesteps), velocity, rtol=1e-4, atol=1e-5)
    else:
        assert torch.equal(ours.target(latents, noise, timesteps), noise)


def test_sample_target_is_the_picture():
    """R-32: the third prediction type."""
    schedule = NoiseSchedule(torch.tensor([0.9, 0.5]), "sample")
    latents = torch.randn(1, 4, 2, 2)
    assert torch.equal(schedule.target(latents, torch.zeros_like(latents), torch.tensor([1])), latents)


def test_noisy_latents_keep_their_variance():
    """A training schedule from an Euler scheduler's configuration is still variance preserving."""
    config = {"_class_name": "EulerDiscreteScheduler", **CONFIGS[1]}
    signal, sigma = schedule_from_config(config).signal_and_noise(torch.arange(1000))
    torch.testing.assert_close(signal**2 + sigma**2, torch.ones(1000, 1, 1, 1))


def test_unknown_betas_are_refused():
    """R-32: nothing is guessed."""
    with pytest.raises(ModelError, match="beta_schedule = 'sigmoid'"):
        schedule_from_config({"beta_schedule": "sigmoid"})


@pytest.mark.parametrize(
    "changes",
    [{"num_train_timesteps": "x"}, {"beta_end": None}, {"trained_betas": [2, 3]}, {"trained_betas": []}],
)
def test_numbers_that_are_none_are_refused(changes: dict[str, Any]) -> None:
    """R-32: one line, whatever a damaged scheduler_config.json holds."""
    with pytest.raises(ModelError, match=r"gives no noise schedule .*; download or copy the base again"):
        schedule_from_config(changes)


def test_log_snr():
    """R-32: log(ᾱ / (1 - ᾱ)) in float64; -∞ in pure noise, which the schedule says it has."""
    schedule = NoiseSchedule(torch.tensor([0.75, 0.5, 0.0]), "v_prediction")
    assert schedule.log_snr.tolist() == pytest.approx([1.0986122886681098, 0.0, -float("inf")])
    assert schedule.has_zero_snr
    assert schedule_from_config(CONFIGS[3]).has_zero_snr
    assert not schedule_from_config(CONFIGS[1]).has_zero_snr
