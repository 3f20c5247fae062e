"""Precisions as the settings spell them."""

from dataclasses import dataclass

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def has_bf16(device: torch.device) -> bool:
    """Whether a GPU has bf16; older ones only emulate it, many times slower."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


@dataclass(frozen=True)
class Precision:
    """Effective dtypes.

    Args:
        compute: fp32, bf16 or fp16: dtype of the denoiser's arithmetic.
        base: Dtype of the denoiser's frozen weights.
    """

    compute: str
    base: str

    @property
    def compute_dtype(self) -> torch.dtype:
        """As torch names it."""
        return DTYPES[self.compute]

    @property
    def base_dtype(self) -> torch.dtype:
        """As torch names it."""
        return DTYPES[self.base]
