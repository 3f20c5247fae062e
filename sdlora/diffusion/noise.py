"""The noise of a training sample: white, shifted by channel, or of several sizes at once.

C channels, H W latent size.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor
from torch.nn import functional

from sdlora.config import ObjectiveSection


def draw_noise(shape: torch.Size, settings: ObjectiveSection, generator: Generator) -> Tensor:
    """The noise ε that the UNet is asked for, (C, H, W).

    Offset noise (Guttenberg 2023, "Diffusion with Offset Noise"): ε' = ε + s ξ, where ξ ~ N(0, I) is one
    number for each channel: the mean of a picture is noised as well, so that the UNet learns to move it.

    Args:
        shape: (C, H, W).
        settings: `noise_offset`, or `pyramid_noise` with `pyramid_discount`.
        generator: Of the sample.
    """
    noise = torch.randn(shape, generator=generator)
    if settings.noise_offset:
        noise = noise + settings.noise_offset * torch.randn((shape[0], 1, 1), generator=generator)
    if settings.pyramid_noise:
        noise = add_pyramid(noise, settings.pyramid_noise, settings.pyramid_discount, generator)
    return noise


def add_pyramid(noise: Tensor, levels: int, discount: float, generator: Generator) -> Tensor:
    """Adds coarser noise to white noise, and brings the sum back to unit variance.

    Multi-resolution noise (Whitaker 2023, "Multi-Resolution Noise for Diffusion Model Training"):
    ε' = (ε + Σ_{i < n} dⁱ up(ε_i)) / std, where ε_i is white noise of 1 / r_iⁱ the size, r_i uniform in
    [2, 4), enlarged bilinearly; the sum ends early at a level of one pixel. Low frequencies gain: the UNet
    learns to move whole areas and the mean, which white noise hardly touches.

    Args:
        noise: White noise ε, (C, H, W).
        levels: n at most.
        discount: d.
        generator: Of the sample.
    """
    channels, height, width = noise.shape
    total = noise
    for level in range(levels):
        ratio = (2 + 2 * float(torch.rand((), generator=generator))) ** level
        size = (max(1, int(height / ratio)), max(1, int(width / ratio)))
        coarse = torch.randn((1, channels, *size), generator=generator)
        total = total + discount**level * functional.interpolate(coarse, (height, width), mode="bilinear")[0]
        if 1 in size:
            break
    return total / total.std()


def perturb(noise: Tensor, strength: float, generator: Generator) -> Tensor:
    """The noise that makes the UNet's input, (C, H, W); its target stays ε.

    Input perturbation (Ning et al. 2023, 2301.11706): x_t = √ᾱ_t x_0 + √(1 - ᾱ_t) (ε + γ ξ) with
    ξ ~ N(0, I): while sampling, the UNet sees its own errors, and gets used to some here.

    Args:
        noise: ε, (C, H, W).
        strength: γ; 0 draws nothing.
        generator: Of the sample.
    """
    return noise + strength * torch.randn(noise.shape, generator=generator) if strength else noise
