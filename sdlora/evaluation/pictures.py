"""How far samples are from drawings of the same captions: in style alone, and in everything.

C channels, h w latent size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdlora.models.stable_diffusion import StableDiffusion


@dataclass(frozen=True, slots=True)
class PictureDistance:
    """Two distances between a sample and a drawing, both root mean squares over VAE latents.

    Latents, since they are what the base sees.

    Args:
        style: Between the mean and the standard deviation of each channel, wherever things lie: palette,
            contrast and how much line there is (the statistics of AdaIN, arXiv 1703.06868, equation 8).
        content: Between the latents themselves: strokes that lie elsewhere count as much as no strokes.
    """

    style: float
    content: float


def picture_distances(
    base: StableDiffusion, samples: Sequence[Tensor], drawings: Sequence[Tensor]
) -> list[PictureDistance]:
    """The distances of each pair.

    Args:
        base: Gives the VAE.
        samples: Pictures (3, H, W) in [-1, 1].
        drawings: The pictures they should look like, in the same order and sizes.
    """
    pairs = zip(_encode(base, samples), _encode(base, drawings), strict=True)
    return [
        PictureDistance(
            style=_rms(_statistics(sample) - _statistics(drawing)), content=_rms(sample - drawing)
        )
        for sample, drawing in pairs
    ]


def mean_distance(distances: Sequence[PictureDistance]) -> PictureDistance:
    """The mean over pictures."""
    count = len(distances)
    return PictureDistance(
        style=sum(distance.style for distance in distances) / count,
        content=sum(distance.content for distance in distances) / count,
    )


def _encode(base: StableDiffusion, pictures: Sequence[Tensor]) -> list[Tensor]:
    return [base.encode_images(picture[None])[0][0].cpu().double() for picture in pictures]


def _statistics(latents: Tensor) -> Tensor:
    """Mean and standard deviation of each channel of (C, h, w), shape (2 C,)."""
    return torch.cat([latents.mean(dim=(1, 2)), latents.std(dim=(1, 2))])


def _rms(difference: Tensor) -> float:
    return float(difference.square().mean().sqrt())
