"""How far samples are from drawings of the same captions: a distance between pictures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sdlora.models.stable_diffusion import StableDiffusion


def picture_distance(base: StableDiffusion, samples: Sequence[Tensor], drawings: Sequence[Tensor]) -> float:
    """The root mean square difference of VAE latents, averaged over pairs.

    Latents, since they are what the base sees: an outline moved by a pixel costs little, a missing
    one much.

    Args:
        base: Gives the VAE.
        samples: Pictures (3, H, W) in [-1, 1].
        drawings: The pictures they should look like, in the same order and sizes.
    """
    distances = []
    for sample, drawing in zip(samples, drawings, strict=True):
        first, _ = base.encode_images(sample[None])
        second, _ = base.encode_images(drawing[None])
        distances.append((first - second).square().mean().sqrt())
    return float(torch.stack(distances).mean())


def to_pixels(image: Image.Image) -> Tensor:
    """A picture as (3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1).float() / 127.5 - 1
