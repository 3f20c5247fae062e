"""The networks of a base without weights, to find and count modules in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdlora.errors import ModelError, shorten
from sdlora.models.base import quiet
from sdlora.models.info import BaseInfo
from sdlora.models.quantize import quantize
from sdlora.models.stable_diffusion import StableDiffusion, wrap_denoiser

DIFFUSERS: dict[str, Any] = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}
MODELS: dict[str, Any] = {
    **DIFFUSERS,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
}
# What building a network from a damaged configuration ends in.
UNFIT = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError),
    StrictDataclassError,
)


def empty_denoiser(info: BaseInfo) -> UNet2DConditionModel:
    """The UNet without weights (on the meta device), to find and count modules in.

    Raises:
        ModelError: If its files hold less than its configuration asks for (R-25).
    """
    unet = empty_model("unet", info.denoiser_config)
    asked = sum(parameter.numel() for parameter in unet.parameters())
    if info.num_parameters < asked:
        raise ModelError(
            f"{info.path} is incomplete: its UNet holds {info.num_parameters:,} numbers, "
            f"its configuration asks for {asked:,}; download or copy it again"
        )
    return unet


def empty_model(name: str, config: Mapping[str, Any]) -> Any:
    """The network of a configuration without weights, on the meta device.

    Args:
        name: `unet` or `vae`.

    Raises:
        ModelError: If the configuration does not give such a network.
    """
    try:
        with quiet(), torch.device("meta"):
            return DIFFUSERS[name].from_config(dict(config))
    except UNFIT as error:
        raise _unbuildable(name, error) from None


def empty_components(info: BaseInfo, *, text: bool) -> dict[str, nn.Module]:
    """The parts that can learn, without weights (on the meta device), to find and count modules in.

    Args:
        text: With text encoders, as deep as they are read (`BaseInfo.unread_layer`).
    """
    parts: dict[str, nn.Module] = {"unet": empty_denoiser(info)}
    for name in info.traits.text_encoders if text else ():
        try:
            config = CLIPTextConfig.from_dict(dict(info.components[name].config))
            if info.unread_layer and info.unread_layer.startswith(f"{name}."):
                config.num_hidden_layers -= 1
            with quiet(), torch.device("meta"):
                parts[name] = MODELS[name](config)
        except UNFIT as error:
            raise _unbuildable(name, error) from None
    return parts


def empty_base(info: BaseInfo, dtype: torch.dtype = torch.float32) -> StableDiffusion:
    """A denoiser without weights (on the meta device), quantized as `info.quantize` asks."""
    denoiser = empty_denoiser(info)
    nn.Module.to(denoiser, dtype)
    if info.quantize != "none":
        # Every scheme dequantizes to the same weights, and this one needs no tables of another package.
        quantize(denoiser, "int8")
    return wrap_denoiser(info, denoiser.requires_grad_(False).eval())


def _unbuildable(name: str, error: Exception) -> ModelError:
    return ModelError(
        f"the config.json of the base's {name} describes no network that can be built "
        f"({reason_of(error)}); download or copy the base again"
    )


def reason_of(error: Exception) -> str:
    """What a library says of its failure, on one line."""
    return shorten(" ".join(str(error).split()) or type(error).__name__)
