"""The forward process against diffusers' own schedulers and hand-computed values (R-32)."""

from __future__ import annotations

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


@pytest.mark.parametrize(
    ("prediction_type", "expected"),
    [
        # SNR at ᾱ = 0.9, 0.5, 0 is 9, 1, 0; γ = 5.
        ("epsilon", [5 / 9, 1.0, 1.0]),
        ("v_prediction", [5 / 10, 1 / 2, 0.0]),
        ("sample", [5.0, 1.0, 0.0]),
    ],
)
def test_min_snr_by_hand(prediction_type, expected):
    """R-32: the weight in the right form for each target, finite at zero terminal SNR."""
    schedule = NoiseSchedule(torch.tensor([0.9, 0.5, 0.0]), prediction_type)
    weight = schedule.min_snr_weight(torch.tensor([0, 1, 2]), 5.0)
    torch.testing.assert_close(weight, torch.tensor(expected))


def test_epsilon_and_v_are_one_objective():
    """R-32: ε and v errors relate by SNR + 1, so the two weighted losses are equal."""
    alpha_bar = torch.linspace(0.999, 0.001, 50)
    timesteps = torch.arange(50)
    epsilon = NoiseSchedule(alpha_bar, "epsilon").min_snr_weight(timesteps, 5.0)
    velocity = NoiseSchedule(alpha_bar, "v_prediction").min_snr_weight(timesteps, 5.0)
    snr = alpha_bar / (1 - alpha_bar)
    # An x_0 error e gives a v error of e / √(1 - ᾱ) and an ε error of e · √SNR.
    torch.testing.assert_close(velocity / (1 - alpha_bar), epsilon * snr, rtol=1e-4, atol=1e-5)


def test_noisy_latents_keep_their_variance():
    """A training schedule from an Euler scheduler's configuration is still variance preserving."""
    config = {"_class_name": "EulerDiscreteScheduler", **CONFIGS[1]}
    signal, sigma = schedule_from_config(config).signal_and_noise(torch.arange(1000))
    torch.testing.assert_close(signal**2 + sigma**2, torch.ones(1000, 1, 1, 1))


def test_unknown_betas_are_refused():
    """R-32: nothing is guessed."""
    with pytest.raises(ModelError, match="beta_schedule = 'sigmoid'"):
        schedule_from_config({"beta_schedule": "sigmoid"})
