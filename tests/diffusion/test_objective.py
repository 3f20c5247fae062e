"""Draws that depend on their key alone, and a loss per sample (R-04, R-32)."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from sdlora.config import ObjectiveSection
from sdlora.diffusion.objective import (
    Objective,
    denoising_loss,
    describe_objective,
    draw,
)
from sdlora.diffusion.schedule import NoiseSchedule, schedule_from_config
from sdlora.seeds import derive_seed

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


EVERYTHING = {
    "loss": "pseudo_huber",
    "min_snr_gamma": 5.0,
    "pyramid_noise": 4,
    "input_perturbation": 0.1,
    "timesteps": "style_friendly",
}


def make_objective(prediction_type: str | None = None, zero_snr: bool = False, **settings) -> Objective:
    schedule = schedule_from_config({**BETAS, "rescale_betas_zero_snr": zero_snr}, prediction_type)
    return Objective(schedule, ObjectiveSection(**settings))


def make_posteriors(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(4, 6, 8, generator=generator), torch.rand(4, 6, 8, generator=generator))
        for _ in range(count)
    ]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"debiased": True},
        {"loss": "huber", "huber_schedule": "exponential"},
        {"loss": "smooth_l1", "min_snr_gamma": 5.0},
    ],
)
def test_the_loss_asks_no_device_for_a_value(prediction_type, settings):
    """A step of many micro-batches must not wait for the GPU in each; on the meta device there is nothing
    to wait for, and asking for a value is an error."""
    objective = make_objective(prediction_type, **settings)
    seeds = [derive_seed("sample", 0, index) for index in range(3)]
    draws = draw(objective, make_posteriors(3), seeds).to(torch.device("meta"))
    loss = denoising_loss(lambda noisy, timesteps: noisy * 0.5, objective, draws)
    assert (loss.device.type, loss.shape) == ("meta", (3,))


@pytest.mark.parametrize("settings", [{}, {"noise_offset": 0.1}, EVERYTHING], ids=["plain", "offset", "all"])
def test_draws_ignore_neighbours_and_ambient_state(settings):
    """R-04: a sample's draws are the same alone, in a batch, and after any other use of the RNG."""
    objective = make_objective(**settings)
    posteriors = make_posteriors(3)
    seeds = [derive_seed("sample", 0, index) for index in range(3)]
    together = draw(objective, posteriors, seeds)
    torch.rand(7), random.random(), np.random.rand()
    alone = draw(objective, posteriors[1:2], seeds[1:2])
    assert torch.equal(together.noise[1:2], alone.noise)
    assert torch.equal(together.input_noise[1:2], alone.input_noise)
    assert torch.equal(together.latents[1:2], alone.latents)
    assert together.timesteps[1] == alone.timesteps[0]


def test_drawing_leaves_the_ambient_state_alone():
    """R-04: nor does a draw change what anyone else draws."""
    before = torch.random.get_rng_state()
    draw(make_objective(**EVERYTHING), make_posteriors(1), [3])
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_fresh_posterior_draw_each_step():
    """The cache holds the posterior, so two steps see two samples of it."""
    objective = make_objective()
    [(mean, std)] = make_posteriors(1)
    first = draw(objective, [(mean, std)], [1]).latents[0]
    second = draw(objective, [(mean, std)], [2]).latents[0]
    assert not torch.equal(first, second)
    assert torch.equal(draw(objective, [(mean, torch.zeros_like(std))], [1]).latents[0], mean)


def test_timestep_range_is_kept():
    """objective.timestep_range has an effect."""
    objective = make_objective(timestep_range=(300, 310))
    drawn = draw(objective, make_posteriors(1) * 200, list(range(200))).timesteps
    assert drawn.min() == 300
    assert drawn.max() == 309


@pytest.mark.parametrize(
    ("settings", "noise", "total"),
    [
        ({}, [-0.6190117, -1.1594385, 1.2030151, 0.1125320], -3.3467578),
        ({"noise_offset": 0.1}, [-0.7233840, -1.2638108, 1.0938419, 0.0033588], -9.4327816),
    ],
)
def test_draws_are_those_of_the_first_release(settings, noise, total):
    """R-04: options that are off draw nothing, so that runs of before can be repeated (golden values)."""
    posteriors = [(torch.zeros(4, 6, 8), torch.ones(4, 6, 8))] * 2
    drawn = draw(make_objective(**settings), posteriors, [derive_seed("golden", n) for n in (0, 1)])
    assert drawn.timesteps.tolist() == [646, 415]
    latents = [0.3212728, 1.4960432, 0.2649842, 0.3846530]
    torch.testing.assert_close(drawn.latents[:, 0, 0, :2].flatten(), torch.tensor(latents))
    torch.testing.assert_close(drawn.noise[:, 3, 5, 6:].flatten(), torch.tensor(noise), rtol=1e-5, atol=1e-6)
    assert float(drawn.noise.double().sum()) == pytest.approx(total, abs=1e-4)
    assert torch.equal(drawn.input_noise, drawn.noise)


def test_a_perturbed_input_keeps_its_target():
    """objective.input_perturbation changes what the UNet sees, not what it is asked for (2301.11706)."""
    plain = draw(make_objective(), make_posteriors(1), [5])
    drawn = draw(make_objective(input_perturbation=0.5), make_posteriors(1), [5])
    assert torch.equal(drawn.noise, plain.noise)
    seen = []
    objective = make_objective(input_perturbation=0.5)

    def answer(noisy, timesteps):
        seen.append(noisy)
        return drawn.noise

    assert denoising_loss(answer, objective, drawn).item() == 0
    signal, sigma = objective.schedule.signal_and_noise(drawn.timesteps)
    extra = (seen[0] - signal * drawn.latents - sigma * drawn.noise) / sigma
    assert float(extra.std()) == pytest.approx(0.5, rel=0.2)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("weights", [{}, {"min_snr_gamma": 5.0}, {"debiased": True}], ids=str)
@pytest.mark.parametrize("loss", ["mse", "pseudo_huber"])
def test_loss_by_hand(prediction_type, weights, loss):
    """R-32: one value per sample, equal to float64 arithmetic, finite at zero terminal SNR."""
    objective = make_objective(prediction_type, zero_snr=True, loss=loss, **weights)
    draws = draw(objective, make_posteriors(3), [1, 2, 3])
    draws.timesteps[2] = 999
    answer = torch.full_like(draws.latents, 0.25)
    found = denoising_loss(lambda noisy, timesteps: answer, objective, draws)

    alpha_bar = objective.schedule.alphas_cumprod[draws.timesteps].double().view(-1, 1, 1, 1)
    latents, noise = draws.latents.double(), draws.noise.double()
    targets = {"epsilon": noise, "sample": latents}
    targets["v_prediction"] = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * latents
    squares = (answer.double() - targets[prediction_type]).square()
    if loss == "pseudo_huber":
        delta = 0.1 + 0.9 / (1 + ((1 - alpha_bar) / alpha_bar).sqrt()) ** 2
        squares = 2 * delta * ((squares + delta**2).sqrt() - delta)
    expected = squares.mean(dim=(1, 2, 3))
    snr = (alpha_bar / (1 - alpha_bar)).flatten()
    if weights.get("min_snr_gamma"):
        clipped = snr.clamp(max=5.0)
        by_type = {"sample": clipped, "v_prediction": clipped / (snr + 1)}
        by_type["epsilon"] = torch.where(snr > 0, clipped / snr, torch.ones_like(snr))
        expected = expected * by_type[prediction_type]
    if weights.get("debiased"):
        root = snr.clamp(1e-3, 1e3).sqrt()
        expected = (
            expected
            * {"sample": root, "v_prediction": root / (root**2 + 1), "epsilon": 1 / root}[prediction_type]
        )
    assert found.shape == (3,)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("loss", ["mse", "huber", "pseudo_huber", "smooth_l1"])
@pytest.mark.parametrize("huber_schedule", ["constant", "exponential", "snr"])
def test_finite_at_both_ends(prediction_type, loss, huber_schedule):
    """R-32: loss and gradient are finite without noise (SNR = inf), in pure noise (SNR = 0), at error 0."""
    schedule = NoiseSchedule(torch.tensor([1.0, 0.5, 0.0]), prediction_type)
    settings = {"loss": loss, "timestep_range": (0, 3)}
    if loss != "mse":
        settings["huber_schedule"] = huber_schedule
    for weights in ({}, {"min_snr_gamma": 5.0}, {"debiased": True}):
        objective = Objective(schedule, ObjectiveSection(**settings, **weights))
        draws = draw(objective, make_posteriors(3), [1, 2, 3])
        draws.timesteps[:] = torch.arange(3)
        target = schedule.target(draws.latents, draws.noise, draws.timesteps)
        for start in (target, torch.zeros_like(target), 1e4 * target):
            answer = start.clone().requires_grad_()
            found = denoising_loss(lambda noisy, timesteps, answer=answer: answer, objective, draws)
            found.sum().backward()
            assert torch.isfinite(found).all()
            assert torch.isfinite(answer.grad).all()


def test_a_perfect_denoiser_has_no_loss():
    """The loss is zero at the truth."""
    objective = make_objective("v_prediction")
    schedule = objective.schedule
    draws = draw(objective, make_posteriors(2), [1, 2])
    truth = schedule.target(draws.latents, draws.noise, draws.timesteps)
    assert denoising_loss(lambda noisy, timesteps: truth, objective, draws).max() == 0


def test_the_objective_in_words():
    """What differs from plain squared errors is in the plan."""
    assert describe_objective(make_objective()) == "mse, uniform timesteps"
    assert describe_objective(
        make_objective(noise_offset=0.05, timestep_range=(200, 1000), debiased=True)
    ) == ("mse, uniform timesteps in 200-999, debiased weights, noise offset 0.05")
    assert describe_objective(make_objective(**EVERYTHING)) == (
        "pseudo_huber (huber_delta 0.1, huber_schedule snr), style_friendly timesteps (timestep_mean -6, "
        "timestep_std 2; half of them in 811-955), min-SNR 5, pyramid noise 4 x 0.3, input perturbation 0.1"
    )
