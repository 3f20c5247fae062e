"""The stock diffusers pipeline of a base, as its users load it: the oracle of many tests."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers import schedulers
from torch import nn

from sdlora.models.base import quiet
from sdlora.models.info import BaseInfo
from sdlora.models.load import DTYPE, load_component
from sdlora.models.stable_diffusion import pipeline_of, without_checker
from sdlora.models.tokenizer import load_tokenizer


def load_stock_pipeline(info: BaseInfo, *, dtype: torch.dtype = torch.float32) -> Any:
    """A fresh pipeline of a base without its safety checker.

    diffusers loads a folder itself, but for a separate VAE; the components of a single file are ours.
    """
    if info.path.is_file():
        parts: dict[str, Any] = {name: load_component(part, dtype) for name, part in info.components.items()}
        parts |= {name: load_tokenizer(info, number) for number, name in enumerate(info.traits.tokenizers)}
        config = dict(info.scheduler_config)
        with quiet():
            scheduler = getattr(schedulers, config["_class_name"]).from_config(config)
        return pipeline_of(info, scheduler=scheduler, **parts)
    parts = {}
    if info.components["vae"].folder != info.path / "vae":
        parts["vae"] = load_component(info.components["vae"], dtype)
    with quiet():
        pipeline = getattr(diffusers, info.traits.pipeline).from_pretrained(
            info.path,
            variant=next((part.variant for part in info.components.values() if part.variant), None),
            use_safetensors=True,
            local_files_only=True,
            **without_checker(info),
            **{DTYPE: dtype},
            **parts,
        )
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            # A CPU's products round by the alignment of weights, which diffusers maps at any address.
            for weight in part.parameters():
                weight.data = weight.data.clone()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
