"""What each timestep counts in the loss, in the form that fits what the UNet answers.

B batch. The SNR is ᾱ / (1 - ᾱ). An x_0 error of e is an ε error of e √SNR and a v error of e √(SNR + 1), so
that the weight of a squared x_0 error becomes one of ε errors by division by SNR, and of v errors by SNR + 1.
"""

from __future__ import annotations

from torch import Tensor

from sdlora.config import ObjectiveSection
from sdlora.diffusion.schedule import NoiseSchedule

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
