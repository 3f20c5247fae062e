"""Weights of the timesteps against hand-computed values (R-32)."""

from __future__ import annotations

import pytest
import torch

from sdlora.config import ObjectiveSection
from sdlora.diffusion.objective import (
    Objective,
    debiased_weight,
    denoising_loss,
    draw,
    layout_samples,
    mask_weights,
    min_snr_weight,
    timestep_weight,
)
from sdlora.diffusion.schedule import NoiseSchedule, schedule_from_config

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}

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


def test_mask_weights_by_hand():
    """At least the floor, mean 1 over each sample, whatever the share of the inside."""
    masks = torch.tensor(
        [[[[1.0, 0.5], [0.0, 0.02]]], [[[1.0, 1.0], [1.0, 1.0]]], [[[0.0, 0.0], [0.0, 0.0]]]]
    )
    found = mask_weights(masks.double(), 0.05)
    mean = (1 + 0.5 + 0.05 + 0.05) / 4
    expected = torch.tensor([[1 / mean, 0.5 / mean, 0.05 / mean, 0.05 / mean], [1.0] * 4, [1.0] * 4])
    torch.testing.assert_close(found.flatten(1), expected.double(), rtol=1e-15, atol=0)


@pytest.mark.parametrize("settings", [{}, {"loss": "huber", "min_snr_gamma": 5.0}], ids=["mse", "huber"])
@pytest.mark.parametrize("prior", [0.0, 0.7])
def test_masked_loss_by_hand(settings, prior):
    """The loss inside, the base's prediction outside, each by float64 arithmetic; a full mask is none."""
    schedule = schedule_from_config(BETAS)
    objective = Objective(schedule, ObjectiveSection(unmasked_prior=prior, **settings))
    generator = torch.Generator().manual_seed(0)
    posteriors = [(torch.randn(4, 3, 5, generator=generator), torch.zeros(4, 3, 5)) for _ in range(2)]
    draws = draw(objective, posteriors, [1, 2])
    masks = torch.rand(2, 1, 3, 5, generator=generator)
    answer, alone = 0.3 * draws.noise, 0.1 * draws.latents
    found = denoising_loss(lambda *_: answer, objective, draws, masks, lambda *_: alone)

    def losses(error):
        if not settings:
            return error.square()
        alpha = schedule.alphas_cumprod[draws.timesteps].double().view(-1, 1, 1, 1)
        delta = 0.1 + 0.9 / (1 + ((1 - alpha) / alpha).sqrt()) ** 2
        return torch.where(error.abs() <= delta, error.square(), delta * (2 * error.abs() - delta))

    answer, noise, inside = answer.double(), draws.noise.double(), masks.double()
    floored = inside.clamp(min=0.05)
    expected = losses(answer - noise) * floored / floored.mean(dim=(1, 2, 3), keepdim=True)
    expected = expected + prior * (1 - inside) * losses(answer - alone.double())
    snr = schedule.snr(draws.timesteps).double()
    weight = (5 / snr).clamp(max=1) if settings else torch.ones(2)
    torch.testing.assert_close(found.double(), expected.mean(dim=(1, 2, 3)) * weight, rtol=1e-5, atol=1e-7)

    full = denoising_loss(
        lambda *_: 0.3 * draws.noise, objective, draws, torch.ones(2, 1, 3, 5), lambda *_: alone
    )
    assert torch.equal(full, denoising_loss(lambda *_: 0.3 * draws.noise, objective, draws))


def test_layout_by_hand():
    """At timesteps of objective.layout_range, the target is the base's own prediction, with its weight."""
    settings = ObjectiveSection(timestep_range=(0, 500), layout_range=(800, 1000), layout_weight=0.2)
    objective = Objective(schedule_from_config(BETAS, "epsilon"), settings)
    posteriors = [(torch.zeros(4, 2, 2), torch.ones(4, 2, 2))] * 24
    drawn = draw(objective, posteriors, list(range(24)))
    layout = drawn.timesteps >= 800
    assert 0 < int(layout.sum()) < 24
    seen = []

    def denoise_base(noisy, timesteps, chosen=None):
        seen.append((len(noisy), timesteps.tolist(), chosen))
        return torch.full_like(noisy, 2.0)

    noise = drawn.noise.clone()
    chosen = layout_samples(drawn, settings)
    assert chosen == layout.nonzero().flatten().tolist()
    loss = denoising_loss(
        lambda noisy, _: torch.zeros_like(noisy), objective, drawn, None, denoise_base, chosen
    )
    expected = torch.where(layout, 0.2 * 2.0**2, noise.square().mean(dim=(1, 2, 3)))
    torch.testing.assert_close(loss, expected)
    assert seen == [(int(layout.sum()), drawn.timesteps[layout].tolist(), chosen)]
    assert torch.equal(drawn.noise, noise)
