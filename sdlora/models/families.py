"""Model families as a table: what other tools call them, and what they are made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Family:
    """One kind of Stable Diffusion.

    Args:
        name: Our word for it, as written into files.
        title: As people say it.
        kohya_version: `ss_base_model_version`.
        kohya_v2: `ss_v2`.
        architecture: `modelspec.architecture` without its `/lora`.
        resolution: The side in pixels that it was trained for, where its own configuration is silent.
        pipeline: The stock diffusers pipeline class.
        text_encoders: Folder names of its text encoders.
    """

    name: str
    title: str
    kohya_version: str
    kohya_v2: bool
    architecture: str
    resolution: int
    pipeline: str = "StableDiffusionPipeline"
    text_encoders: tuple[str, ...] = ("text_encoder",)

    @property
    def tokenizers(self) -> tuple[str, ...]:
        """Folder names of its tokenizers, one for each text encoder."""
        return tuple(name.replace("text_encoder", "tokenizer") for name in self.text_encoders)


SD1 = Family("sd1", "Stable Diffusion 1.x", "sd_v1", False, "stable-diffusion-v1", 512)
SD2 = Family("sd2", "Stable Diffusion 2.x", "sd_v2", True, "stable-diffusion-v2-512", 512)
SD2_V = Family("sd2", "Stable Diffusion 2.x", "sd_v2_v", True, "stable-diffusion-v2-768-v", 768)
SDXL = Family(
    "sdxl",
    "Stable Diffusion XL",
    "sdxl_base_v1-0",
    False,
    "stable-diffusion-xl-v1-base",
    1024,
    "StableDiffusionXLPipeline",
    ("text_encoder", "text_encoder_2"),
)

FAMILIES = {family.name: family for family in (SD1, SD2, SDXL)}


def family_of(denoiser_config: Mapping[str, Any]) -> str:
    """The family, by what conditions the denoiser; widths do not decide, since small variants exist."""
    if denoiser_config.get("addition_embed_type") == "text_time":
        return "sdxl"
    return "sd2" if denoiser_config.get("use_linear_projection") else "sd1"


def describe_family(name: str, prediction_type: str) -> Family:
    """The row of the table; Stable Diffusion 2 has one for each prediction type."""
    if name == "sd2" and prediction_type == "v_prediction":
        return SD2_V
    return FAMILIES[name]
