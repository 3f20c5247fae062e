"""Which noise levels are trained: a probability for each timestep of the base.

T timesteps of the schedule; t = 0 has the least noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from sdlora.config import ObjectiveSection
from sdlora.diffusion.schedule import NoiseSchedule
from sdlora.errors import ConfigError


@dataclass(frozen=True)
class TimestepSampler:
    """Draws timesteps in [low, high).

    Args:
        low: First timestep.
        high: The one after the last.
        cumulative: P(timestep <= t), (T,), float64; None draws uniformly.
    """

    low: int
    high: int
    cumulative: Tensor | None = None

    def draw(self, generator: Generator) -> Tensor:
        """One timestep, shape (1,)."""
        if self.cumulative is None:
            return torch.randint(self.low, self.high, (1,), generator=generator)
        return torch.tensor([self.quantile(float(torch.rand((), generator=generator, dtype=torch.float64)))])

    def quantile(self, share: float) -> int:
        """The least t with P(timestep <= t) above a share in [0, 1)."""
        if self.cumulative is None:
            return self.low + int(share * (self.high - self.low))
        return int(torch.searchsorted(self.cumulative, share, right=True))


def make_sampler(schedule: NoiseSchedule, settings: ObjectiveSection) -> TimestepSampler:
    """The sampler of `objective.timesteps`.

    Raises:
        ConfigError: If the distribution leaves nothing in `objective.timestep_range`.
    """
    low, high = settings.timestep_range
    high = min(high, schedule.num_timesteps)
    if settings.timesteps == "uniform":
        return TimestepSampler(low, high)
    cumulative = timestep_probabilities(schedule, settings).cumsum(0)
    # By its own last number, which is 1 then to the bit: no share below 1 lies behind all timesteps.
    return TimestepSampler(low, high, cumulative / cumulative[-1])


def timestep_probabilities(schedule: NoiseSchedule, settings: ObjectiveSection) -> Tensor:
    """P(t) for each timestep, shape (T,), float64; 0 outside `objective.timestep_range`, whose sum is 1.

    uniform: all alike.

    logit_normal (Esser et al. 2024, 2403.03206, equation 19): u = σ(z) with z ~ N(m, s²), and t = ⌊u T⌋, so
    that P(t) = Φ((logit((t + 1) / T) - m) / s) - Φ((logit(t / T) - m) / s). m = 0 favours the middle, m > 0
    much noise.

    style_friendly (Choi et al. 2024, 2411.14793): the log-SNR λ = log(ᾱ / (1 - ᾱ)) is normal,
    λ ~ N(m, s²), with m = -6 and s = 2: high noise, where layout, palette and manner are decided. Here t is
    the timestep whose λ_t is nearest: P(t) = Φ((e_t - m) / s) - Φ((e_{t+1} - m) / s) with e_t half way from
    λ_{t-1} to λ_t. A discrete base ends at some λ_{T-1} (-5.4 for Stable Diffusion 1 and 2, and SDXL); the
    normal is cut there and at λ_0, since clamping would put 62 % of all samples on the last timestep.

    Raises:
        ConfigError: If the distribution leaves nothing in the range.
    """
    count = schedule.num_timesteps
    low, high = settings.timestep_range
    inside = torch.zeros(count, dtype=torch.float64)
    inside[low:high] = 1
    if settings.timesteps == "uniform":
        return inside / inside.sum()
    mean, std = settings.timestep_normal
    if settings.timesteps == "logit_normal":
        edges = torch.logit(torch.linspace(0, 1, count + 1, dtype=torch.float64))
    else:
        log_snr = schedule.log_snr
        middles = (log_snr[:-1] + log_snr[1:]) / 2
        edges = torch.cat([log_snr[:1], middles, log_snr[-1:]])
    probabilities = torch.special.ndtr((edges - mean) / std).diff().abs() * inside
    total = probabilities.sum()
    if not total > 1e-9:
        raise ConfigError(
            f"objective.timesteps = {settings.timesteps} with mean {mean:g} and standard deviation {std:g} "
            f"leaves nothing in objective.timestep_range = [{low}, {high}]; widen the range, or change "
            "objective.timestep_mean"
        )
    normalised: Tensor = probabilities / total
    return normalised
