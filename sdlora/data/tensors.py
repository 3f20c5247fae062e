"""An image becomes the tensors that a base takes."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from sdlora.data.buckets import Crop
from sdlora.data.records import Size


def image_to_tensor(image: Image.Image) -> torch.Tensor:
    """RGB pixels as float32 (3, H, W) in [-1, 1]."""
    values = np.array(image.convert("RGB"), dtype=np.float32)
    return torch.from_numpy(values / 127.5 - 1.0).permute(2, 0, 1).contiguous()


def crop_to_time_ids(original: Size, crop: Crop) -> torch.Tensor:
    """What SDXL is told of an image's sizes (Podell et al. 2023, 2307.01952, section 2.2).

    Args:
        original: The whole image as a viewer shows it, before it was scaled.
        crop: Its place is counted in the scaled image, as SDXL was trained; in a mirrored one from the
            left that the model sees.

    Returns:
        (6,) float32: original height, width; top, left; target height, width.
    """
    target = crop.size
    sizes = (original.height, original.width, crop.top, crop.shown_left, target.height, target.width)
    return torch.tensor(sizes, dtype=torch.float32)
