"""Distributions of timesteps against hand-computed probabilities (R-04, R-32)."""

from __future__ import annotations

import math

import pytest
import torch

from sdlora.config import ObjectiveSection
from sdlora.diffusion.schedule import (
    NoiseSchedule,
    make_sampler,
    schedule_from_config,
    timestep_probabilities,
)
from sdlora.errors import ConfigError
from sdlora.objectives import TIMESTEPS
from tests.checks import raises

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SCHEDULE = schedule_from_config(BETAS)


def normal(value: float) -> float:
    """Φ, by another way than the code's."""
    return (1 + math.erf(value / math.sqrt(2))) / 2


def section(timesteps: str = "style_friendly", **values) -> ObjectiveSection:
    return ObjectiveSection(timesteps=timesteps, **values)


def test_style_friendly_by_hand():
    """2411.14793 on a base of four timesteps: the share of a normal nearest to each log-SNR, cut."""
    log_snr = [2.0, -1.0, -5.0, -7.0]
    schedule = NoiseSchedule(torch.sigmoid(torch.tensor(log_snr, dtype=torch.float64)), "epsilon")
    edges = [2.0, 0.5, -3.0, -6.0, -7.0]
    mass = [normal((edges[i] + 6) / 2) - normal((edges[i + 1] + 6) / 2) for i in range(4)]
    expected = torch.tensor(mass, dtype=torch.float64) / sum(mass)
    settings = section(timestep_range=(0, 4))
    torch.testing.assert_close(timestep_probabilities(schedule, settings), expected, rtol=1e-6, atol=1e-9)


def test_style_friendly_on_stable_diffusion():
    """The log-SNR of what is drawn is the normal that was asked for, cut at the base's own ends."""
    probabilities = timestep_probabilities(SCHEDULE, section())
    log_snr = SCHEDULE.log_snr
    low, high = float(log_snr[-1]), float(log_snr[0])
    assert low == pytest.approx(-5.365, abs=0.01)
    for limit in (-5.0, -4.0, -2.0, 0.0):
        whole = normal((high + 6) / 2) - normal((low + 6) / 2)
        expected = (normal((limit + 6) / 2) - normal((low + 6) / 2)) / whole
        assert float(probabilities[log_snr <= limit].sum()) == pytest.approx(expected, abs=0.003)
    # Clamping would put 62 % there.
    assert float(probabilities[-1]) < 0.005


def test_zero_terminal_snr_and_no_noise():
    """R-32: a base that ends in pure noise, or begins without any, has finite probabilities too."""
    schedule = NoiseSchedule(torch.tensor([1.0, 0.5, 0.01, 0.0]), "v_prediction")
    probabilities = timestep_probabilities(schedule, section(timestep_range=(0, 4)))
    assert torch.isfinite(probabilities).all()
    assert float(probabilities.sum()) == pytest.approx(1)
    whole = schedule_from_config({**BETAS, "rescale_betas_zero_snr": True}, "v_prediction")
    probabilities = timestep_probabilities(whole, section())
    log_snr = whole.log_snr
    mean = float((probabilities[:-1] * log_snr[:-1]).sum() / probabilities[:-1].sum())
    assert mean == pytest.approx(-6, abs=0.05)


def test_logit_normal_by_hand():
    """2403.03206: σ(z) falls into the bins 0-1/4 … 3/4-1 as often as z between their logits."""
    schedule = NoiseSchedule(torch.tensor([0.9, 0.6, 0.3, 0.1]), "epsilon")
    settings = section("logit_normal", timestep_mean=0.5, timestep_std=1.5, timestep_range=(0, 4))
    edges = [-math.inf, -math.log(3), 0.0, math.log(3), math.inf]
    shares = [normal((edge - 0.5) / 1.5) for edge in edges]
    expected = torch.tensor(shares, dtype=torch.float64).diff()
    torch.testing.assert_close(timestep_probabilities(schedule, settings), expected)


def test_cubic_by_hand():
    """2302.08453: ⌊(1 - u³) 4⌋ is 3 for u below 4^(-1/3), 2 up to 2^(-1/3), 1 up to (3/4)^(1/3), else 0."""
    schedule = NoiseSchedule(torch.tensor([0.9, 0.6, 0.3, 0.1]), "epsilon")
    limits = [1.0, 0.75 ** (1 / 3), 0.5 ** (1 / 3), 0.25 ** (1 / 3), 0.0]
    expected = -torch.tensor(limits, dtype=torch.float64).diff()
    found = timestep_probabilities(schedule, section("cubic", timestep_range=(0, 4)))
    torch.testing.assert_close(found, expected)
    share = torch.rand(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counts = ((1 - share**3) * 4).long().bincount(minlength=4) / len(share)
    torch.testing.assert_close(counts.double(), expected, rtol=0, atol=0.005)


def test_sigmoid_by_hand():
    """OneTrainer: 1 / (1 + exp(-w (x - 1/2 - b))) at x = 0, 1/3, 2/3, 1."""
    schedule = NoiseSchedule(torch.tensor([0.9, 0.6, 0.3, 0.1]), "epsilon")
    settings = section("sigmoid", timestep_weight=6.0, timestep_bias=1 / 6, timestep_range=(0, 4))
    weights = [1 / (1 + math.exp(exponent)) for exponent in (4, 2, 0, -2)]
    expected = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    torch.testing.assert_close(timestep_probabilities(schedule, settings), expected)


@pytest.mark.parametrize("timesteps", TIMESTEPS)
def test_draws_follow_the_probabilities(timesteps):
    """What is drawn is what was worked out; objective.timestep_range cuts."""
    settings = section(timesteps, timestep_range=(100, 900))
    sampler = make_sampler(SCHEDULE, settings)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([sampler.draw(generator) for _ in range(4000)])
    assert drawn.dtype == torch.int64
    assert 100 <= int(drawn.min()) <= int(drawn.max()) < 900
    assert sampler.quantile(0.0) == 100
    probabilities = timestep_probabilities(SCHEDULE, settings)
    for start in range(100, 900, 100):
        expected = float(probabilities[start : start + 100].sum())
        share = float(((drawn >= start) & (drawn < start + 100)).double().mean())
        assert share == pytest.approx(expected, abs=0.03)


def test_a_uniform_draw_is_the_old_one():
    """R-04: the same number from the same place of the generator."""
    sampler = make_sampler(SCHEDULE, ObjectiveSection(timestep_range=(5, 700)))
    expected = torch.randint(5, 700, (1,), generator=torch.Generator().manual_seed(3))
    assert torch.equal(sampler.draw(torch.Generator().manual_seed(3)), expected)


def test_layout_timesteps_by_their_width():
    """R-04: [0, 500) and [800, 1000) are drawn from as 5 to 2; nothing between."""
    sampler = make_sampler(SCHEDULE, ObjectiveSection(timestep_range=(0, 500), layout_range=(800, 1000)))
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([sampler.draw(generator) for _ in range(4000)])
    layout = drawn >= 800
    assert bool((layout | (drawn < 500)).all())
    assert float(layout.double().mean()) == pytest.approx(2 / 7, abs=0.03)
    assert sampler.layout_share == 2 / 7
    assert drawn.max() <= 999


def test_mean_and_std_have_an_effect():
    """R-35: objective.timestep_mean and timestep_std move and widen what is drawn."""
    steps = torch.arange(1000, dtype=torch.float64)

    def mean_of(**values):
        return float((timestep_probabilities(SCHEDULE, section(**values)) * steps).sum())

    assert mean_of(timestep_mean=-2.0) < mean_of() < mean_of(timestep_std=1.0)
    assert mean_of(timesteps="logit_normal", timestep_mean=1.0) > 600


def test_nothing_left():
    """R-35: a range that the distribution does not reach is one line that names both."""
    shown = ("style_friendly", "timestep_mean -6", "objective.timestep_range = [0, 9]")
    with raises(ConfigError, "objective.timesteps", shows=shown):
        make_sampler(SCHEDULE, section(timestep_std=0.5, timestep_range=(0, 9)))


@pytest.mark.parametrize("timesteps", ["logit_normal", "style_friendly"])
@pytest.mark.parametrize("last", [999, 1000])
def test_the_largest_draw_is_in_the_range(timesteps, last):
    """R-32: rounding in the sum of all probabilities leaves no share for a timestep that there is not."""
    for mean in range(-6, 3):
        settings = section(timesteps, timestep_mean=mean, timestep_range=(0, last))
        assert make_sampler(SCHEDULE, settings).quantile(1 - 2**-53) < last, mean
