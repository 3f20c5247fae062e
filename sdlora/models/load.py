"""Loading a base that was inspected: its frozen components, or a stock pipeline of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from sdlora.config import Quantize
from sdlora.dtypes import VAE_DTYPES
from sdlora.errors import ModelError
from sdlora.models.base import Base, quiet
from sdlora.models.components import AGAIN, Component
from sdlora.models.info import BaseInfo
from sdlora.models.safety import find_checker
from sdlora.models.stable_diffusion import StableDiffusion, pipeline_of
from sdlora.models.tokenizer import load_tokenizer
from sdlora.models.weights import empty_model, fill, load_text_encoder, read_network

# diffusers renamed an argument of from_pretrained.
DTYPE = "dtype" if tuple(map(int, diffusers.__version__.split(".")[:2])) >= (0, 42) else "torch_dtype"


def load_base(
    info: BaseInfo,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    vae_dtype: torch.dtype | None = None,
    lazy: bool = False,
) -> StableDiffusion:
    """Loads and freezes a base.

    `base.quantize` applies to the UNet alone: text encoders are on the device before it, never at a run's
    peak, and their full states are those that every user of the adapter has.

    Text encoders are fp32, and the VAE by default as in `VAE_DTYPES`. With `lazy`, each component is loaded
    when it is first needed, so that not all are in memory. Raises a ModelError if weights are missing or not
    finite.
    """
    dtypes = {"unet": dtype, "vae": vae_dtype or VAE_DTYPES[dtype]}
    dtypes |= dict.fromkeys(info.traits.text_encoders, torch.float32)

    def load(name: str) -> Any:
        scheme = info.quantize if name == "unet" else "none"
        return load_component(info.components[name], dtypes[name], device, scheme)

    parts = [empty_component(info.components[name], dtypes[name]) if lazy else load(name) for name in dtypes]
    denoiser, vae, *text_encoders = parts
    tokenizers = tuple(load_tokenizer(info, number) for number in range(len(info.tokenizers)))
    checker = find_checker(info, device) if info.names_safety_checker else None
    return StableDiffusion(info, denoiser, vae, tuple(text_encoders), tokenizers, dtype, checker, load)


def empty_component(part: Component, dtype: torch.dtype) -> Any:
    """One component without weights, on the meta device."""
    model = empty_model(part.name, part.config)
    nn.Module.to(model, dtype)
    return model.requires_grad_(False).eval()


def load_component(
    part: Component, dtype: torch.dtype, device: torch.device | str = "cpu", scheme: Quantize = "none"
) -> Any:
    """One component, frozen and in eval mode; raises a ModelError if weights are missing or not finite.

    UNet and VAE are streamed from their files to the device and quantized on the way.
    """
    if part.name.startswith("text_encoder"):
        model, missing = load_text_encoder(part, dtype)
        model = model.to(device)
    else:
        model = empty_model(part.name, part.config)
        # A VAE's convolutions in bf16 take 0.3 to 0.9 of the time in this layout; a CPU's kernels read it.
        is_on_cpu = torch.device(device).type == "cpu"
        is_suited = dtype == torch.bfloat16 and (is_on_cpu or part.name == "vae")
        layout = torch.channels_last if is_suited else torch.preserve_format
        tensors = read_network(part)
        missing = fill(model, tensors, part, dtype=dtype, device=device, scheme=scheme, layout=layout)
    if missing:
        raise ModelError(
            f"{part.path} lacks {len(missing)} weights of its {part.name} ({min(missing)} …); {AGAIN}",
            key="base.incomplete",
        )
    if part.name == "vae":
        compute_in_place(model)
    return model.requires_grad_(False).eval()


class InPlaceBlock(ResnetBlock2D):  # type: ignore[misc]
    """A residual block that is never trained: to the bit the same from half as many new tensors.

    In a VAE each of them has the size of the image, and on a CPU new memory costs as much as the arithmetic.
    """

    def forward(self, input_tensor: Tensor, temb: None = None, *_: Any, **__: Any) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(input_tensor), inplace=True))
        hidden = self.conv2(F.silu(self.norm2(hidden), inplace=True))
        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor)
        answer: Tensor = hidden.add_(input_tensor)
        return answer

    @staticmethod
    def suits(layer: nn.Module) -> bool:
        """Whether a layer is a residual block as in the VAEs of Stable Diffusion."""
        return (
            type(layer) is ResnetBlock2D
            and not any((layer.upsample, layer.downsample, layer.time_emb_proj))
            and isinstance(layer.nonlinearity, nn.SiLU)
            and layer.time_embedding_norm in {"default", "group"}
            and bool(layer.output_scale_factor == 1)
        )


def compute_in_place(vae: nn.Module) -> None:
    """Lets the blocks of a frozen VAE in eval mode write over what nobody reads again."""
    for layer in filter(InPlaceBlock.suits, vae.modules()):
        layer.__class__ = InPlaceBlock


@contextmanager
def full_base(base: Base) -> Iterator[Base]:
    """The base with its denoiser unquantized, in the same dtype, while the quantized one is on the CPU."""
    assert isinstance(base, StableDiffusion)
    device, info = base.device, replace(base.info, quantize="none")
    base.denoiser.to("cpu")
    try:
        denoiser = load_component(info.components["unet"], base.dtype, device)
        yield replace(base, info=info, denoiser=denoiser)
    finally:
        base.denoiser.to(device)


def load_fresh_pipeline(info: BaseInfo, text_encoders: Sequence[str], dtype: torch.dtype) -> Any:
    """A stock pipeline with a UNet that diffusers loads from its folder, and text encoders in fp32."""
    unet = info.components["unet"]
    parts = {name: load_component(info.components[name], torch.float32) for name in text_encoders}
    if unet.folder is None:
        parts["unet"] = load_component(unet, dtype)
    else:
        # No pickles, and no network: a base that was found is on disk.
        options: dict[str, Any] = {"variant": unet.variant, DTYPE: dtype}
        with quiet():
            parts["unet"] = UNet2DConditionModel.from_pretrained(
                unet.folder, use_safetensors=True, local_files_only=True, **options
            )
    return pipeline_of(info, scheduler=None, **parts)
