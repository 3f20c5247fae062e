"""How an error of the UNet's answer counts: squared, or less for large ones.

B batch, C channels, H W latent size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdlora.config import ObjectiveSection
from sdlora.diffusion.schedule import NoiseSchedule


def elementwise_loss(
    error: Tensor, schedule: NoiseSchedule, timesteps: Tensor, settings: ObjectiveSection
) -> Tensor:
    """The loss of each element of an error e, both (B, C, H, W).

    All but smooth_l1 equal e² where |e| is far below δ, so that the learning rate keeps its meaning:
    mse: e².
    huber (Huber 1964): e² for |e| <= δ, else δ (2 |e| - δ).
    pseudo_huber (Khrapov et al. 2024, 2403.16728): 2 δ (√(e² + δ²) - δ).
    smooth_l1 (Song & Dhariwal 2023, 2310.14189): 2 (√(e² + δ²) - δ), which grows by 2 |e| far from
    0 at every timestep, whatever δ is there.

    Args:
        error: The UNet's answer less the target.
        schedule: For a δ that follows the SNR.
        timesteps: (B,).
        settings: `loss`, `huber_delta`, `huber_schedule`.
    """
    if settings.loss == "mse":
        return error.square()
    delta = huber_delta(schedule, timesteps, settings).view(-1, 1, 1, 1)
    if settings.loss == "huber":
        size = error.abs()
        return torch.where(size <= delta, error.square(), delta * (2 * size - delta))
    # √(e² + δ²) - δ without the difference of two nearly equal numbers.
    smooth = 2 * error.square() / ((error.square() + delta**2).sqrt() + delta)
    return smooth if settings.loss == "smooth_l1" else delta * smooth


def huber_delta(schedule: NoiseSchedule, timesteps: Tensor, settings: ObjectiveSection) -> Tensor:
    """δ_t at each timestep, shape (B,), from δ = `huber_delta`.

    constant: δ.
    exponential (2403.16728): δ^(t / T), from 1 without noise to δ in noise: errors in details are squared,
    and outliers weigh less where layout is decided.
    snr, the same thought by the noise itself: δ + (1 - δ) / (1 + σ_t)² with σ_t = √((1 - ᾱ_t) / ᾱ_t), finite
    at SNR = 0 and ∞.
    """
    delta = settings.huber_delta
    if settings.huber_schedule == "constant":
        return torch.full(timesteps.shape, delta, device=timesteps.device)
    if settings.huber_schedule == "exponential":
        return delta ** (timesteps / schedule.num_timesteps)
    signal, sigma = schedule.signal_and_noise(timesteps)
    # 1 / (1 + σ_t), where σ_t may be infinite.
    share = (signal / (signal + sigma)).flatten()
    return delta + (1 - delta) * share.square()


SNR_RANGE = (1e-3, 1e3)


def timestep_weight(schedule: NoiseSchedule, timesteps: Tensor, settings: ObjectiveSection) -> Tensor | None:
    """The weight of each sample by its timestep, (B,); None if all count alike."""
    if settings.min_snr_gamma:
        return min_snr_weight(schedule, timesteps, settings.min_snr_gamma)
    return debiased_weight(schedule, timesteps) if settings.debiased else None


def min_snr_weight(schedule: NoiseSchedule, timesteps: Tensor, gamma: float) -> Tensor:
    """The Min-SNR-γ weight, shape (B,).

    Hang et al. 2023 (2303.09556), section 3.4: min(SNR, γ) for x_0 targets, divided by SNR for ε targets and
    by SNR + 1 for v targets. Written so that it stays finite at SNR = 0 and ∞.
    """
    snr = schedule.snr(timesteps)
    if schedule.prediction_type == "epsilon":
        return (gamma / snr).clamp(max=1)
    clipped = snr.clamp(max=gamma)
    return clipped if schedule.prediction_type == "sample" else clipped / (snr + 1)


def debiased_weight(schedule: NoiseSchedule, timesteps: Tensor) -> Tensor:
    """The weight of debiased estimation, shape (B,): high noise counts more.

    Yu et al. 2023 (2310.08442): 1 / √SNR for ε targets, which is √SNR for x_0 targets and
    √SNR / (SNR + 1) for v targets. The SNR is kept in [0.001, 1000]: no weight is infinite at SNR = 0 or ∞,
    and no base without zero terminal SNR goes below.
    """
    snr = schedule.snr(timesteps).clamp(*SNR_RANGE)
    if schedule.prediction_type == "epsilon":
        return snr.rsqrt()
    return snr.sqrt() if schedule.prediction_type == "sample" else snr.sqrt() / (snr + 1)
