"""The forward process of a base, signal and noise at each timestep, and the draw of timesteps.

B batch, C channels, H W latent size, T timesteps of the schedule; t = 0 has the least noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor

from sdlora.config import ObjectiveSection
from sdlora.errors import ConfigError, ModelError
from sdlora.objectives import TIMESTEPS


@dataclass(frozen=True)
class NoiseSchedule:
    """The forward process q(x_t | x_0) = N(√ᾱ_t x_0, (1 - ᾱ_t) I): Ho et al. 2020 (2006.11239), equation 4.

    Args:
        alphas_cumprod: ᾱ, shape (T,), float32.
        prediction_type: What the denoiser predicts: epsilon, v_prediction or sample.
    """

    alphas_cumprod: Tensor
    prediction_type: str
    _copies: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def num_timesteps(self) -> int:
        return int(self.alphas_cumprod.shape[0])

    def alpha_bar(self, timesteps: Tensor) -> Tensor:
        """ᾱ_t, shape (B,); the schedule is copied to a device once."""
        device = timesteps.device
        if device not in self._copies:
            self._copies[device] = self.alphas_cumprod.to(device)
        return self._copies[device][timesteps]

    def signal_and_noise(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """√ᾱ_t and √(1 - ᾱ_t), each of shape (B, 1, 1, 1)."""
        alpha_bar = self.alpha_bar(timesteps)
        return alpha_bar.sqrt().view(-1, 1, 1, 1), (1 - alpha_bar).sqrt().view(-1, 1, 1, 1)

    def snr(self, timesteps: Tensor) -> Tensor:
        """ᾱ_t / (1 - ᾱ_t), shape (B,); 0 at the last step of a zero-terminal-SNR schedule."""
        alpha_bar = self.alpha_bar(timesteps)
        return alpha_bar / (1 - alpha_bar)

    @property
    def log_snr(self) -> Tensor:
        """log(ᾱ / (1 - ᾱ)) of every timestep, shape (T,), float64; -∞ at zero terminal SNR."""
        return torch.logit(self.alphas_cumprod.double())

    @property
    def log_snr_edges(self) -> Tensor:
        """Log-SNR half way between neighbouring timesteps, shape (T + 1,), float64, falling."""
        log_snr = self.log_snr
        return torch.cat([log_snr[:1], (log_snr[:-1] + log_snr[1:]) / 2, log_snr[-1:]])

    @property
    def time_edges(self) -> Tensor:
        """0, 1/T, … 1, shape (T + 1,), float64; timestep t covers t/T to (t + 1)/T."""
        return torch.linspace(0, 1, self.num_timesteps + 1, dtype=torch.float64)

    @property
    def has_zero_snr(self) -> bool:
        """Whether the last timestep is pure noise, where predicting ε teaches nothing."""
        return bool(self.alphas_cumprod[-1] <= 0)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = √ᾱ_t x_0 + √(1 - ᾱ_t) ε (2006.11239, equation 4); all of shape (B, C, H, W)."""
        signal, sigma = self.signal_and_noise(timesteps)
        return signal * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the denoiser should predict, shape (B, C, H, W).

        epsilon: ε (2006.11239, equation 14). v_prediction: v = √ᾱ_t ε - √(1 - ᾱ_t) x_0
        (Salimans & Ho 2022, 2202.00512, appendix D). sample: x_0.
        """
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return latents
        signal, sigma = self.signal_and_noise(timesteps)
        return signal * noise - sigma * latents


def schedule_from_config(config: Mapping[str, Any], prediction_type: str | None = None) -> NoiseSchedule:
    """Builds the training schedule from a diffusers `scheduler_config.json`.

    The betas decide, not the scheduler's class: the Euler scheduler of single files has an `add_noise` that
    is not variance preserving. A `prediction_type` replaces the configuration's own. Raises a ModelError if
    the beta schedule is unknown or invalid.
    """
    try:
        betas = betas_from_config(config)
    except (TypeError, ValueError, RuntimeError):
        betas = torch.empty(0)
    if len(betas) < 2 or not bool(((betas >= 0) & (betas < 1)).all()):
        raise ModelError(
            "the base's scheduler_config.json gives no noise schedule (num_train_timesteps, beta_start, "
            "beta_end, trained_betas); download or copy the base again"
        )
    if config.get("rescale_betas_zero_snr"):
        betas = rescale_to_zero_terminal_snr(betas)
    alphas_cumprod = torch.cumprod(1 - betas, dim=0).float()
    return NoiseSchedule(alphas_cumprod, prediction_type or config.get("prediction_type") or "epsilon")


def betas_from_config(config: Mapping[str, Any]) -> Tensor:
    """β_1 … β_T in float64, shape (T,)."""
    if config.get("trained_betas") is not None:
        return torch.tensor(config["trained_betas"], dtype=torch.float64)
    count = int(config.get("num_train_timesteps", 1000))
    start, end = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
    kind = config.get("beta_schedule", "linear")
    if kind == "linear":
        return torch.linspace(start, end, count, dtype=torch.float64)
    if kind == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, count, dtype=torch.float64) ** 2
    if kind == "squaredcos_cap_v2":
        return _cosine_betas(count)
    raise ModelError(
        f"beta_schedule = {kind!r} in the base's scheduler_config.json is not known; "
        "linear, scaled_linear and squaredcos_cap_v2 are"
    )


def _cosine_betas(count: int) -> Tensor:
    """Nichol & Dhariwal 2021 (2102.09672), equation 17, with β capped at 0.999."""

    def alpha_bar(time: float) -> float:
        return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - alpha_bar((i + 1) / count) / alpha_bar(i / count), 0.999) for i in range(count)]
    return torch.tensor(betas, dtype=torch.float64)


def rescale_to_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Shifts and scales √ᾱ so that the last step is pure noise: Lin et al. 2023 (2305.08891), algorithm 1."""
    root = torch.cumprod(1 - betas, dim=0).sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    alpha_bar = root**2
    return 1 - torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])


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

    Raises a ConfigError if that range has no probability.
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
