"""Loading a base that was inspected: its frozen parts, its empty UNet, or a plain pipeline of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import diffusers
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from sdlora.errors import ModelError
from sdlora.models.info import BaseInfo, inspect_base
from sdlora.models.quiet import quiet
from sdlora.models.stable_diffusion import StableDiffusion
from sdlora.models.tokens import load_tokenizer

with quiet():
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline

__all__ = [
    "BaseInfo",
    "StockPipeline",
    "attention_kernel",
    "empty_unet",
    "inspect_base",
    "load_base",
    "load_stock_pipeline",
    "pipeline_of",
]

StockPipeline: TypeAlias = StableDiffusionPipeline | StableDiffusionXLPipeline
PIPELINES: dict[str, Any] = {
    cls.__name__: cls for cls in (StableDiffusionPipeline, StableDiffusionXLPipeline)
}
TEXT_ENCODERS: dict[str, Any] = {
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
}

# No pickles, no trust_remote_code; a base that was found is on the disk.
# diffusers renamed an argument of from_pretrained.
DTYPE = "dtype" if tuple(map(int, diffusers.__version__.split(".")[:2])) >= (0, 42) else "torch_dtype"
SAFE = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}


def load_base(info: BaseInfo, *, dtype: torch.dtype, device: torch.device | str) -> StableDiffusion:
    """Loads and freezes a base.

    Args:
        dtype: Of the UNet. Text encoders are fp32, the VAE as `vae_dtype` says.
        device: Where all parts go; `StableDiffusion.encoders_to` moves the encoders away.

    Raises:
        ModelError: If the files lack weights that the configuration asks for.
    """
    unet = _load(UNet2DConditionModel, info.folder / "unet", dtype)
    vae = _load(AutoencoderKL, info.vae_folder, vae_dtype(info, dtype, device))
    text_encoders = tuple(
        _load(TEXT_ENCODERS[name], info.folder / name, torch.float32, "dtype")
        for name in info.traits.text_encoders
    )
    tokenizers = tuple(load_tokenizer(info, name) for name in info.traits.tokenizers)
    for part in (unet, vae, *text_encoders):
        part.to(device).requires_grad_(False).eval()
    return StableDiffusion(info, unet, vae, text_encoders, tokenizers, dtype)


def _load(model: Any, folder: Path, dtype: torch.dtype, name: str = DTYPE) -> Any:
    """One part; weights that would be left at random are an error, not a warning."""
    with quiet():
        loaded, report = model.from_pretrained(folder, **SAFE, **{name: dtype})
    missing = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if missing:
        raise ModelError(
            f"{folder} lacks {len(missing)} weights that its config.json asks for ({missing[0]} ...); "
            "download or copy the base again"
        )
    return loaded


def vae_dtype(info: BaseInfo, dtype: torch.dtype, device: torch.device | str) -> torch.dtype:
    """bf16 on CUDA beside a bf16 UNet, unless the VAE's configuration asks for fp32; else fp32 (R-22)."""
    small = dtype == torch.bfloat16 and torch.device(device).type == "cuda"
    return torch.bfloat16 if small and not info.vae_config.get("force_upcast", True) else torch.float32


def empty_unet(info: BaseInfo) -> UNet2DConditionModel:
    """The UNet without weights (on the meta device), to find and count modules in."""
    with quiet(), torch.device("meta"):
        unet: UNet2DConditionModel = UNet2DConditionModel.from_config(dict(info.unet_config))
    return unet


def pipeline_of(info: BaseInfo, **parts: Any) -> Any:
    """The stock pipeline of a base around some parts; the others are left out, a safety checker too.

    Args:
        parts: `unet`, `scheduler` and so on, by diffusers' names.
    """
    left_out = dict.fromkeys(("vae", *info.traits.text_encoders, *info.traits.tokenizers))
    with quiet():
        pipeline = PIPELINES[info.traits.pipeline](**left_out, **_without_checker(info), **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_stock_pipeline(
    info: BaseInfo, *, dtype: torch.dtype = torch.float32, unet_only: bool = False
) -> StockPipeline:
    """A fresh diffusers pipeline of the base, as its users load it, without a safety checker.

    Args:
        dtype: Of all its parts.
        unet_only: Leave VAE and text encoders out.
    """
    parts: Mapping[str, Any] = {}
    if unet_only:
        parts = dict.fromkeys(("vae", *info.traits.text_encoders, *info.traits.tokenizers))
    elif info.vae_folder != info.folder / "vae":
        parts = {"vae": _load(AutoencoderKL, info.vae_folder, dtype)}
    with quiet():
        pipeline: StockPipeline = PIPELINES[info.traits.pipeline].from_pretrained(
            info.folder,
            use_safetensors=True,
            local_files_only=True,
            **_without_checker(info),
            **{DTYPE: dtype},
            **parts,
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _without_checker(info: BaseInfo) -> dict[str, Any]:
    """SDXL's pipeline knows no safety checker."""
    if info.family == "sdxl":
        return {}
    return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def attention_kernel(unet: UNet2DConditionModel) -> str:
    """Which attention the UNet runs, for the log (R-46); diffusers picks SDPA where torch has it."""
    kinds = sorted({type(processor).__name__ for processor in unet.attn_processors.values()})
    return "SDPA" if kinds == ["AttnProcessor2_0"] else ", ".join(kinds)
