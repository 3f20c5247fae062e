"""Draws timesteps: a probability for each timestep of the base, from the entry of `objective.timesteps`.

T timesteps of the schedule; t = 0 has the least noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from sdlora.config import ObjectiveSection
from sdlora.diffusion.schedule import NoiseSchedule
from sdlora.errors import ConfigError
from sdlora.objectives import TIMESTEPS


@dataclass(frozen=True)
class TimestepSampler:
    """Draws timesteps in [low, high), and in `layout` as often as its width demands.

    Args:
        low: The first timestep.
        high: One past the last.
        cumulative: P(timestep <= t), (T,), float64; None for uniform.
        layout: `objective.layout_range`: its first timestep, and one past its last.
    """

    low: int
    high: int
    cumulative: Tensor | None = None
    layout: tuple[int, int] | None = None

    def draw(self, generator: Generator) -> Tensor:
        """One timestep, shape (1,)."""
        if self.cumulative is None:
            if self.layout is None:
                return torch.randint(self.low, self.high, (1,), generator=generator)
            width, (first, end) = self.high - self.low, self.layout
            drawn = torch.randint(width + end - first, (1,), generator=generator)
            return torch.where(drawn < width, self.low + drawn, first + drawn - width)
        if self.layout and float(torch.rand((), generator=generator)) < self.layout_share:
            return torch.randint(*self.layout, (1,), generator=generator)
        return torch.tensor([self.quantile(float(torch.rand((), generator=generator, dtype=torch.float64)))])

    @property
    def layout_share(self) -> float:
        """The share of timesteps that are drawn from `layout`."""
        width = self.layout[1] - self.layout[0] if self.layout else 0
        return width / (width + self.high - self.low)

    def quantile(self, share: float) -> int:
        """The least t with P(timestep <= t) above a share in [0, 1)."""
        if self.cumulative is None:
            return self.low + int(share * (self.high - self.low))
        return int(torch.searchsorted(self.cumulative, share, right=True))


def make_sampler(schedule: NoiseSchedule, settings: ObjectiveSection) -> TimestepSampler:
    """The sampler of `objective.timesteps`."""
    low, high = settings.timestep_range
    high, layout = min(high, schedule.num_timesteps), settings.layout_range
    if layout:
        layout = (layout[0], min(layout[1], schedule.num_timesteps))
    if settings.timesteps == "uniform":
        return TimestepSampler(low, high, layout=layout)
    cumulative = timestep_probabilities(schedule, settings).cumsum(0)
    # Divided by its last value, it ends in exactly 1: every share below 1 is inside the range.
    return TimestepSampler(low, high, cumulative / cumulative[-1], layout)


def timestep_probabilities(schedule: NoiseSchedule, settings: ObjectiveSection) -> Tensor:
    """P(t) of each timestep, shape (T,), float64; 0 outside `objective.timestep_range`.

    Raises:
        ConfigError: If `objective.timestep_range` has no probability.
    """
    low, high = settings.timestep_range
    entry = TIMESTEPS[settings.timesteps]
    parameters = settings.parameters(entry)
    weights: Tensor = entry.function(schedule, **parameters)
    weights[:low] = weights[high:] = 0
    if not weights.sum() > 1e-9:
        raise ConfigError(
            f"objective.timesteps = {settings.timesteps} ({describe_parameters(parameters)}) has almost no "
            f"probability in objective.timestep_range = [{low}, {high}]; widen the range or change the "
            "distribution"
        )
    return weights / weights.sum()


def describe_parameters(parameters: dict[str, float | str]) -> str:
    """Parameters and their values, such as `huber_delta 0.1, huber_schedule snr`."""
    texts = {name: value if isinstance(value, str) else f"{value:g}" for name, value in parameters.items()}
    return ", ".join(f"{name} {text}" for name, text in texts.items())
