"""Draws that depend on their key alone, and a loss per sample (R-04, R-32)."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from sdlora.diffusion.objective import Objective, denoising_loss, derive_seed, draw, keyed_generator
from sdlora.diffusion.schedule import schedule_from_config

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def make_posteriors(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(4, 6, 8, generator=generator), torch.rand(4, 6, 8, generator=generator))
        for _ in range(count)
    ]


def test_draws_ignore_neighbours_and_ambient_state():
    """R-04: a sample's draws are the same alone, in a batch, and after any other use of the RNG."""
    objective = Objective(schedule_from_config(BETAS), noise_offset=0.1)
    posteriors = make_posteriors(3)
    seeds = [derive_seed("sample", 0, index) for index in range(3)]
    together = draw(objective, posteriors, seeds)
    torch.rand(7), random.random(), np.random.rand()
    alone = draw(objective, posteriors[1:2], seeds[1:2])
    assert torch.equal(together.noise[1:2], alone.noise)
    assert torch.equal(together.latents[1:2], alone.latents)
    assert together.timesteps[1] == alone.timesteps[0]


def test_drawing_leaves_the_ambient_state_alone():
    """R-04: nor does a draw change what anyone else draws."""
    before = torch.random.get_rng_state()
    draw(Objective(schedule_from_config(BETAS)), make_posteriors(1), [3])
    assert torch.equal(before, torch.random.get_rng_state())


def test_seeds_differ_by_purpose_and_counter():
    """R-04: no two keys share a stream."""
    keys = [("a", 1, 23), ("a", 12, 3), ("b", 1, 23), ("a", 1, 24)]
    assert len({derive_seed(*key) for key in keys}) == len(keys)
    assert keyed_generator("a", 1).initial_seed() == derive_seed("a", 1)


def test_a_fresh_posterior_draw_each_step():
    """The cache holds the posterior, so two steps see two samples of it."""
    objective = Objective(schedule_from_config(BETAS))
    [(mean, std)] = make_posteriors(1)
    first = draw(objective, [(mean, std)], [1]).latents[0]
    second = draw(objective, [(mean, std)], [2]).latents[0]
    assert not torch.equal(first, second)
    assert torch.equal(draw(objective, [(mean, torch.zeros_like(std))], [1]).latents[0], mean)


def test_timestep_range_is_kept():
    """objective.timestep_range has an effect."""
    objective = Objective(schedule_from_config(BETAS), timestep_range=(300, 310))
    drawn = draw(objective, make_posteriors(1) * 200, list(range(200))).timesteps
    assert drawn.min() == 300
    assert drawn.max() == 309


def test_noise_offset_shifts_channels():
    """objective.noise_offset adds noise that is constant over a channel."""
    schedule = schedule_from_config(BETAS)
    plain = draw(Objective(schedule), make_posteriors(1), [5]).noise
    offset = draw(Objective(schedule, noise_offset=0.3), make_posteriors(1), [5]).noise
    shift = (offset - plain)[0]
    torch.testing.assert_close(shift.std(dim=(1, 2)), torch.zeros(4), atol=1e-6, rtol=0)
    assert shift.abs().max() > 1e-3


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("gamma", [0.0, 5.0])
def test_loss_by_hand(prediction_type, gamma):
    """R-32: one value per sample, equal to float64 arithmetic, finite at zero terminal SNR."""
    schedule = schedule_from_config({**BETAS, "rescale_betas_zero_snr": True}, prediction_type)
    objective = Objective(schedule, min_snr_gamma=gamma, timestep_range=(0, 1000))
    draws = draw(objective, make_posteriors(3), [1, 2, 3])
    draws.timesteps[2] = 999
    answer = torch.full_like(draws.latents, 0.25)
    loss = denoising_loss(lambda noisy, timesteps: answer, objective, draws)

    alpha_bar = schedule.alphas_cumprod[draws.timesteps].double().view(-1, 1, 1, 1)
    latents, noise = draws.latents.double(), draws.noise.double()
    targets = {"epsilon": noise, "sample": latents}
    targets["v_prediction"] = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * latents
    expected = (answer.double() - targets[prediction_type]).square().mean(dim=(1, 2, 3))
    if gamma:
        snr = (alpha_bar / (1 - alpha_bar)).flatten()
        clipped = snr.clamp(max=gamma)
        weights = {"sample": clipped, "v_prediction": clipped / (snr + 1)}
        weights["epsilon"] = torch.where(snr > 0, clipped / snr, torch.ones_like(snr))
        expected = expected * weights[prediction_type]
    assert loss.shape == (3,)
    assert torch.isfinite(loss).all()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-7)


def test_a_perfect_denoiser_has_no_loss():
    """The loss is zero at the truth."""
    schedule = schedule_from_config(BETAS, "v_prediction")
    objective = Objective(schedule)
    draws = draw(objective, make_posteriors(2), [1, 2])
    truth = schedule.target(draws.latents, draws.noise, draws.timesteps)
    assert denoising_loss(lambda noisy, timesteps: truth, objective, draws).max() == 0
