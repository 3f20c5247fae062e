"""Loading a base that was inspected: its frozen parts, its empty UNet, or a plain pipeline of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import diffusers
import torch
from diffusers import schedulers
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn

from sdlora.config import Quantize
from sdlora.errors import ModelError
from sdlora.models.base import Base, quiet
from sdlora.models.components import Component
from sdlora.models.info import BaseInfo
from sdlora.models.safety import find_checker
from sdlora.models.stable_diffusion import (
    PIPELINES,
    StableDiffusion,
    StockPipeline,
    pipeline_of,
    without_checker,
)
from sdlora.models.tokenizer import load_tokenizer
from sdlora.models.weights import (
    MODELS,
    UNFIT,
    check_finite,
    denoiser_names,
    empty_model,
    fill,
    load_original,
    read_tensors,
    reason_of,
)

# No pickles, no trust_remote_code; a base that was found is on the disk.
SAFE = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
# diffusers renamed an argument of from_pretrained.
DTYPE = "dtype" if tuple(map(int, diffusers.__version__.split(".")[:2])) >= (0, 42) else "torch_dtype"
ALIGNMENT = 64  # bytes, of memory that torch allocates


def load_base(
    info: BaseInfo, *, dtype: torch.dtype, device: torch.device | str, waits: bool = False
) -> StableDiffusion:
    """Loads and freezes a base.

    `base.quantize` is for the UNet alone: text encoders are on the device before it, never at a run's peak,
    and the states that they give in full are those that every user of the adapter has.

    Args:
        dtype: Of the UNet. Text encoders are fp32, the VAE as `vae_dtype` says.
        device: Where all parts go; `StableDiffusion.encoders_to` moves the encoders away.
        waits: Whether UNet, VAE and text encoders stay on the CPU until they are wanted.

    Raises:
        ModelError: If the files lack weights that the configuration asks for.
    """
    place = "cpu" if waits else device
    denoiser = load_denoiser(info.components["unet"], dtype, place, info.quantize)
    vae = load_component(info.components["vae"], vae_dtype(info, dtype, device))
    text_encoders = tuple(
        load_component(info.components[name], torch.float32) for name in info.traits.text_encoders
    )
    tokenizers = tuple(load_tokenizer(info, number) for number in range(len(info.tokenizers)))
    for part in (vae, *text_encoders):
        _unmap(part.to(place).requires_grad_(False).eval())
    checker = find_checker(info, device) if info.names_safety_checker else None
    return StableDiffusion(info, denoiser, vae, text_encoders, tokenizers, dtype, checker)


def load_denoiser(
    part: Component, dtype: torch.dtype, device: torch.device | str = "cpu", scheme: Quantize = "none"
) -> UNet2DConditionModel:
    """The UNet, streamed from its files to the device and quantized on the way.

    Raises:
        ModelError: If weights are missing or not finite.
    """
    unet = empty_model("unet", part.config)
    names = None if part.folder is not None else denoiser_names(part)
    tensors = read_tensors(part, names)
    _check_complete(part, fill(unet, tensors, part, dtype=dtype, device=device, scheme=scheme))
    return unet.requires_grad_(False).eval()


@contextmanager
def full_base(base: Base) -> Iterator[Base]:
    """The base with its denoiser unquantized, in the same dtype, while the quantized one is on the CPU."""
    assert isinstance(base, StableDiffusion)
    device, info = base.device, replace(base.info, quantize="none")
    base.denoiser.to("cpu")
    try:
        yield replace(base, info=info, denoiser=load_denoiser(info.components["unet"], base.dtype, device))
    finally:
        base.denoiser.to(device)


def load_component(part: Component, dtype: torch.dtype) -> Any:
    """One part, of whichever source, on the CPU.

    Raises:
        ModelError: If weights would be left at random, or are not numbers.
    """
    if part.name == "unet":
        return load_denoiser(part, dtype)
    with quiet():
        loaded, missing = (
            _load_folder(part, dtype) if part.folder else load_original(MODELS[part.name], part, dtype)
        )
    _check_complete(part, missing)
    for name, weight in loaded.named_parameters():
        check_finite(part, name, weight)
    return loaded


def _load_folder(part: Component, dtype: torch.dtype) -> tuple[Any, list[str]]:
    """A part in a folder of its own, and the weights that it lacks."""
    name = "dtype" if part.name.startswith("text_encoder") else DTYPE
    try:
        loaded, report = MODELS[part.name].from_pretrained(
            part.folder, variant=part.variant, **SAFE, **{name: dtype}
        )
    except UNFIT as error:
        raise ModelError(
            f"{part.folder}: config.json and weights do not belong together ({reason_of(error)}); "
            "download or copy the base again"
        ) from None
    return loaded, sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])


def _unmap(model: nn.Module) -> nn.Module:
    """Copies weights that still lie in a mapped file, at whatever address the file has them.

    A CPU's matrix products round by the alignment of their operands: without this, the same weights in
    another file train to other last bits (R-43).
    """
    for weight in model.parameters():
        if weight.device.type == "cpu" and weight.data_ptr() % ALIGNMENT:
            weight.data = weight.data.clone()
    return model


def _check_complete(part: Component, missing: Sequence[str]) -> None:
    if missing:
        raise ModelError(
            f"{part.folder or part.files[0]} lacks {len(missing)} weights of its {part.name} "
            f"({sorted(missing)[0]} ...); download or copy the base again"
        )


def vae_dtype(info: BaseInfo, dtype: torch.dtype, device: torch.device | str) -> torch.dtype:
    """bf16 on CUDA beside a bf16 UNet, unless the VAE's configuration asks for fp32; else fp32 (R-22)."""
    small = dtype == torch.bfloat16 and torch.device(device).type == "cuda"
    return torch.bfloat16 if small and not info.vae_config.get("force_upcast", True) else torch.float32


def load_stock_pipeline(
    info: BaseInfo, *, dtype: torch.dtype = torch.float32, only: Sequence[str] | None = None
) -> StockPipeline:
    """A fresh diffusers pipeline of the base, as its users load it, without a safety checker.

    Args:
        dtype: Of all its parts.
        only: The UNet and these text encoders, in fp32 as they are used here, and no other part.
    """
    if info.path.is_file():
        return _assemble_pipeline(info, dtype, only)
    parts: dict[str, Any] = {}
    if only is not None:
        names = ("vae", *info.traits.text_encoders, *info.traits.tokenizers)
        parts = {
            name: load_component(info.components[name], torch.float32) if name in only else None
            for name in names
        }
    elif info.components["vae"].folder != info.path / "vae":
        parts = {"vae": load_component(info.components["vae"], dtype)}
    variants = {part.variant for part in info.components.values() if part.variant}
    with quiet():
        pipeline: StockPipeline = PIPELINES[info.traits.pipeline].from_pretrained(
            info.path,
            variant=next(iter(variants), None),
            use_safetensors=True,
            local_files_only=True,
            **without_checker(info),
            **{DTYPE: dtype},
            **parts,
        )
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            _unmap(part)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _assemble_pipeline(info: BaseInfo, dtype: torch.dtype, only: Sequence[str] | None) -> StockPipeline:
    """A stock pipeline from the parts of a single file."""
    dtypes = dict.fromkeys(info.components, dtype) if only is None else dict.fromkeys(only, torch.float32)
    dtypes["unet"] = dtype
    parts: dict[str, Any] = {
        name: _unmap(load_component(info.components[name], kind).eval()) for name, kind in dtypes.items()
    }
    if only is None:
        for number, name in enumerate(info.traits.tokenizers):
            parts[name] = load_tokenizer(info, number)
    config = dict(info.scheduler_config)
    with quiet():
        scheduler = getattr(schedulers, config["_class_name"]).from_config(config)
    pipeline: StockPipeline = pipeline_of(info, scheduler=scheduler, **parts)
    return pipeline
