"""A picture becomes the tensor that a VAE takes."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image


def image_to_tensor(image: Image.Image) -> torch.Tensor:
    """RGB pixels as float32 (3, H, W) in [-1, 1]."""
    values = np.array(image.convert("RGB"), dtype=np.float32)
    return torch.from_numpy(values / 127.5 - 1.0).permute(2, 0, 1).contiguous()
