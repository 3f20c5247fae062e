"""Tensors of an image: its pixels, its mask, and the sizes and crop that SDXL is conditioned on."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from sdlora.data.buckets import Crop
from sdlora.data.records import Size


def image_to_tensor(image: Image.Image) -> torch.Tensor:
    """RGB pixels as float32 (3, H, W) in [-1, 1]."""
    values = np.array(image.convert("RGB"), dtype=np.float32)
    return torch.from_numpy(values / 127.5 - 1.0).permute(2, 0, 1).contiguous()


def mask_to_tensor(mask: Image.Image, factor: int) -> torch.Tensor:
    """A grey mask averaged over squares of `factor` px, as float32 (1, H / factor, W / factor) in [0, 1]."""
    values = torch.from_numpy(np.array(mask, dtype=np.float32) / 255.0)
    return functional.avg_pool2d(values[None], factor)


def crop_to_time_ids(original: Size, crop: Crop) -> torch.Tensor:
    """Size and crop conditioning of SDXL (Podell et al. 2023, 2307.01952, section 2.2).

    Offsets count in the scaled image, as SDXL was trained; after mirroring, from the left side as shown.

    Returns:
        (6,) float32: original height, width; top, left; target height, width.
    """
    target = crop.size
    sizes = (original.height, original.width, crop.top, crop.shown_left, target.height, target.width)
    return torch.tensor(sizes, dtype=torch.float32)
