"""Precisions as the settings spell them."""

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def has_bf16(device: torch.device) -> bool:
    """Whether a GPU has bf16; older ones only emulate it, many times slower."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
