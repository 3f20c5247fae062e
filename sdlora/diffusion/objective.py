"""What one training sample draws, and the loss of a batch: one value per sample.

B batch, C channels, H W latent size, L tokens, D width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdlora.diffusion.schedule import NoiseSchedule

Denoiser = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Objective:
    """The loss's settings.

    Args:
        schedule: The forward process and what the UNet answers.
        min_snr_gamma: γ of the Min-SNR weight; 0 weighs all timesteps alike.
        noise_offset: Share of noise that is constant over a channel of a picture.
        timestep_range: First timestep, and the one after the last.
    """

    schedule: NoiseSchedule
    min_snr_gamma: float = 0.0
    noise_offset: float = 0.0
    timestep_range: tuple[int, int] = (0, 1000)


@dataclass(frozen=True)
class Draws:
    """Everything random in a batch: latents (B, C, H, W), noise (B, C, H, W), timesteps (B,)."""

    latents: Tensor
    noise: Tensor
    timesteps: Tensor

    def to(self, device: torch.device) -> Draws:
        """The same draws on a device."""
        return Draws(self.latents.to(device), self.noise.to(device), self.timesteps.to(device))


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from a purpose and counters; equal parts give equal seeds everywhere."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def keyed_generator(*parts: int | str) -> torch.Generator:
    """A CPU generator that depends on its parts alone, never on what was drawn before."""
    return torch.Generator().manual_seed(derive_seed(*parts))


def draw(objective: Objective, posteriors: Sequence[tuple[Tensor, Tensor]], seeds: Sequence[int]) -> Draws:
    """Draws latents, timesteps and noise, each sample from its own generator.

    Args:
        objective: Gives the timestep range and the noise offset.
        posteriors: Mean and standard deviation of the VAE for each sample, each (C, H, W).
        seeds: One seed for each sample, from `derive_seed`.
    """
    low, high = objective.timestep_range
    high = min(high, objective.schedule.num_timesteps)
    latents, noise, timesteps = [], [], []
    for (mean, std), seed in zip(posteriors, seeds, strict=True):
        generator = torch.Generator().manual_seed(seed)
        latents.append(mean + std * torch.randn(mean.shape, generator=generator))
        timesteps.append(torch.randint(low, high, (1,), generator=generator))
        sample_noise = torch.randn(mean.shape, generator=generator)
        if objective.noise_offset:
            shift = torch.randn((mean.shape[0], 1, 1), generator=generator)
            sample_noise = sample_noise + objective.noise_offset * shift
        noise.append(sample_noise)
    return Draws(torch.stack(latents), torch.stack(noise), torch.cat(timesteps))


def denoising_loss(denoise: Denoiser, objective: Objective, draws: Draws) -> Tensor:
    """The weighted squared error of the UNet's answer, one value per sample, shape (B,).

    Rombach et al. 2022 (2112.10752), equation 2, for the base's own prediction type.

    Args:
        denoise: Takes noisy latents (B, C, H, W) and timesteps (B,), answers (B, C, H, W).
        objective: Schedule and weighting.
        draws: What was drawn for the batch.
    """
    schedule = objective.schedule
    noisy = schedule.add_noise(draws.latents, draws.noise, draws.timesteps)
    answer = denoise(noisy, draws.timesteps).float()
    target = schedule.target(draws.latents, draws.noise, draws.timesteps)
    loss = (answer - target).square().mean(dim=(1, 2, 3))
    if objective.min_snr_gamma:
        loss = loss * schedule.min_snr_weight(draws.timesteps, objective.min_snr_gamma)
    return loss
