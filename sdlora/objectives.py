"""Loss functions and timestep distributions: one entry each, from which everything else derives.

`LOSSES` and `TIMESTEPS` hold the choices of `objective.loss` and `objective.timesteps`. To add one, write its
function and its entry here: config.py makes settings of its parameters (with their bounds, and refused
where they have no effect), and `sdlora settings`, the plan and the files' metadata show them.

config.py imports this file, so it uses methods of tensors and never torch itself.
B batch, C channels, H W latent size, T timesteps of the schedule; t = 0 has the least noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Schedule(Protocol):
    """The part of `diffusion.schedule.NoiseSchedule` that entries use."""

    @property
    def num_timesteps(self) -> int: ...

    @property
    def time_edges(self) -> Tensor: ...

    @property
    def log_snr_edges(self) -> Tensor: ...

    def signal_and_noise(self, timesteps: Tensor) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Parameter:
    """A number, or a choice, of a loss or distribution; the setting `objective.NAME`.

    Args:
        default: Used unless the setting is given.
        description: As in `sdlora settings`.
        bounds: Of a number, as pydantic names them: ge, gt, le, lt.
        choices: Of a string.
    """

    default: float | str
    description: str
    bounds: Mapping[str, float] = field(default_factory=dict)
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Entry:
    """A loss function or timestep distribution.

    Args:
        function: Of a loss, called with the error (B, C, H, W), the schedule, the timesteps (B,) and the
            parameters by name; returns (B, C, H, W). Of a distribution, called with the schedule and the
            parameters; returns weights (T,), float64, in proportion to the probabilities.
        description: As in `sdlora settings`.
        parameters: By the name of the setting.
    """

    function: Callable[..., Tensor]
    description: str
    parameters: Mapping[str, Parameter] = field(default_factory=dict)


def mse(error: Tensor, schedule: Schedule, timesteps: Tensor) -> Tensor:
    """e²."""
    return error.square()


def l1(error: Tensor, schedule: Schedule, timesteps: Tensor) -> Tensor:
    """|e|, which hardly heeds outliers; its gradients do not shrink with the error."""
    return error.abs()


def huber(error: Tensor, schedule: Schedule, timesteps: Tensor, **parameters: Any) -> Tensor:
    """Huber (1964): e² for |e| <= δ, else δ (2 |e| - δ); equals e² for small errors."""
    delta, size = huber_delta(error, schedule, timesteps, **parameters), error.abs()
    return error.square().where(size <= delta, delta * (2 * size - delta))


def pseudo_huber(error: Tensor, schedule: Schedule, timesteps: Tensor, **parameters: Any) -> Tensor:
    """Khrapov et al. 2024 (2403.16728): 2 δ (√(e² + δ²) - δ), about e² for small errors."""
    delta = huber_delta(error, schedule, timesteps, **parameters)
    return delta * _root_difference(error, delta)


def smooth_l1(error: Tensor, schedule: Schedule, timesteps: Tensor, **parameters: Any) -> Tensor:
    """Song & Dhariwal 2023 (2310.14189): 2 (√(e² + δ²) - δ), about 2 |e| for large errors, whatever δ."""
    return _root_difference(error, huber_delta(error, schedule, timesteps, **parameters))


def _root_difference(error: Tensor, delta: Tensor) -> Tensor:
    """2 (√(e² + δ²) - δ) without the difference of two nearly equal numbers."""
    return 2 * error.square() / ((error.square() + delta**2).sqrt() + delta)


def huber_delta(
    error: Tensor,
    schedule: Schedule,
    timesteps: Tensor,
    huber_delta: float = 0.1,
    huber_schedule: str = "snr",
) -> Tensor:
    """δ_t of each sample, shape (B, 1, 1, 1), from δ = `huber_delta`.

    constant: δ.
    exponential (2403.16728): δ^(t / T), from 1 without noise to δ in pure noise: errors in details are
    squared, and outliers weigh less where the layout is decided.
    snr (as sd-scripts has it): δ + (1 - δ) / (1 + σ_t)² with σ_t = √((1 - ᾱ_t) / ᾱ_t); finite at
    SNR = 0 and ∞.
    """
    if huber_schedule == "constant":
        return error.new_full((len(timesteps), 1, 1, 1), huber_delta)
    if huber_schedule == "exponential":
        return (huber_delta ** (timesteps / schedule.num_timesteps)).view(-1, 1, 1, 1)
    signal, sigma = schedule.signal_and_noise(timesteps)
    # 1 / (1 + σ_t), where σ_t may be infinite.
    share = signal / (signal + sigma)
    return huber_delta + (1 - huber_delta) * share.square()


HUBER = {
    "huber_delta": Parameter(
        0.1, "error at which the loss turns from squared to absolute", {"ge": 1e-3, "le": 1e3}
    ),
    "huber_schedule": Parameter(
        "snr",
        "dependence of huber_delta on the timestep: constant, exponential or snr",
        choices=("constant", "exponential", "snr"),
    ),
}

LOSSES = {
    "mse": Entry(mse, "squared error"),
    "l1": Entry(l1, "absolute error"),
    "huber": Entry(huber, "squared, then linear", HUBER),
    "pseudo_huber": Entry(pseudo_huber, "a smooth Huber loss", HUBER),
    "smooth_l1": Entry(smooth_l1, "absolute, smooth at 0", HUBER),
}


def uniform(schedule: Schedule) -> Tensor:
    """Every timestep equally often."""
    return schedule.time_edges.new_ones(schedule.num_timesteps)


def logit_normal(schedule: Schedule, timestep_mean: float, timestep_std: float) -> Tensor:
    """Esser et al. 2024 (2403.03206), equation 19: t = ⌊σ(z) T⌋ with z ~ N(m, s²).

    P(t) = Φ((logit((t + 1) / T) - m) / s) - Φ((logit(t / T) - m) / s). m = 0 favors the middle, m > 0 high
    noise. sd-scripts' `timestep_sampling = sigmoid` is m = 0 with s = `sigmoid_scale`.
    """
    return _normal_cdf((schedule.time_edges.logit() - timestep_mean) / timestep_std).diff()


def style_friendly(schedule: Schedule, timestep_mean: float, timestep_std: float) -> Tensor:
    """Choi et al. 2024 (2411.14793): the log-SNR λ = log(ᾱ / (1 - ᾱ)) is normal, λ ~ N(m, s²).

    m = -6 and s = 2 favour high noise, where layout, palette and brushwork are decided. t is the timestep
    whose λ_t is nearest: P(t) = Φ((e_t - m) / s) - Φ((e_{t+1} - m) / s) with e_t half way from λ_{t-1} to
    λ_t. A discrete base ends at some λ_{T-1} (-5.4 for SD 1, SD 2 and SDXL); the normal is cut there and at
    λ_0, since clamping would put 62 % of all samples on the last timestep.
    """
    return _normal_cdf((schedule.log_snr_edges - timestep_mean) / timestep_std).diff().abs()


def cubic(schedule: Schedule) -> Tensor:
    """T2I-Adapter (Mou et al. 2023, 2302.08453, section 3.4): t = ⌊(1 - u³) T⌋ with uniform u.

    P(t) = (1 - t / T)^(1/3) - (1 - (t + 1) / T)^(1/3): high noise, and some of all the rest. ai-toolkit
    calls it `content_or_style = style`.
    """
    return -(1 - schedule.time_edges).pow(1 / 3).diff()


def sigmoid(schedule: Schedule, timestep_weight: float, timestep_bias: float) -> Tensor:
    """OneTrainer's SIGMOID: P(t) in proportion to σ(w (t / (T - 1) - 1/2 - b)).

    w and b are OneTrainer's `noising_weight` and `noising_bias`: w > 0 favors high noise, w < 0 low noise,
    and b > 0 moves the turning point towards high noise. (sd-scripts' sigmoid is `logit_normal`.)
    """
    time = schedule.time_edges[:-1] * (schedule.num_timesteps / max(1, schedule.num_timesteps - 1))
    return (timestep_weight * (time - 0.5 - timestep_bias)).sigmoid()


def _normal_cdf(value: Tensor) -> Tensor:
    """Φ."""
    return (1 + (value * math.sqrt(0.5)).erf()) * 0.5


_MEAN, _STD = "mean of the normal distribution", "standard deviation of the normal distribution"

TIMESTEPS = {
    "uniform": Entry(uniform, "equally often"),
    "logit_normal": Entry(
        logit_normal,
        "mid noise, as SD3",
        {"timestep_mean": Parameter(0.0, _MEAN), "timestep_std": Parameter(1.0, _STD, {"gt": 0})},
    ),
    "style_friendly": Entry(
        style_friendly,
        "high noise, normal in log-SNR",
        {"timestep_mean": Parameter(-6.0, _MEAN), "timestep_std": Parameter(2.0, _STD, {"gt": 0})},
    ),
    "cubic": Entry(cubic, "high noise, as T2I-Adapter"),
    "sigmoid": Entry(
        sigmoid,
        "a sigmoid of t / T, as OneTrainer",
        {
            "timestep_weight": Parameter(8.0, "steepness of the sigmoid; below 0 favors low noise"),
            "timestep_bias": Parameter(
                0.0, "offset of its turning point from the middle", {"gt": -1, "lt": 1}
            ),
        },
    ),
}
