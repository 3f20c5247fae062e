"""Names of dtypes: as the settings spell them, and as safetensors headers do."""

from dataclasses import dataclass

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
VAE_DTYPES = {torch.float32: torch.float32, torch.bfloat16: torch.bfloat16, torch.float16: torch.float32}
"""The VAE's dtype beside a denoiser's: a VAE overflows in fp16 alone."""
STORED = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
STORED_NAMES = {dtype: name for name, dtype in STORED.items()}


def has_bf16(device: torch.device) -> bool:
    """Whether a GPU has bf16; older ones only emulate it, many times slower."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


@dataclass(frozen=True)
class Precision:
    """Effective dtypes of the denoiser's arithmetic and of its frozen weights: fp32, bf16 or fp16.

    `vae` is that of the VAE in an earlier part of a resumed run, whose latents it must continue.
    """

    compute: str
    base: str
    vae: str | None = None

    @property
    def compute_dtype(self) -> torch.dtype:
        return DTYPES[self.compute]

    @property
    def base_dtype(self) -> torch.dtype:
        return DTYPES[self.base]

    @property
    def vae_dtype(self) -> torch.dtype:
        return DTYPES[self.vae] if self.vae else VAE_DTYPES[self.base_dtype]
