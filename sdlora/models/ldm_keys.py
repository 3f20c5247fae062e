"""Loads a part of a base from the tensors of a single file, through diffusers' own renaming of them."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors import safe_open
from torch import Tensor, nn
from transformers import CLIPTextConfig

from sdlora.models.components import Part
from sdlora.models.weights import read_header

OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def denoiser_names(part: Part) -> dict[str, str]:
    """From the names of a UNet's tensors in a single file to diffusers' own."""
    stored = {name: name for name in read_header(part.files[0]).shapes if name.startswith(part.prefix)}
    return {name: new for new, name in convert_ldm_unet_checkpoint(stored, dict(part.config)).items()}


def load_original(model: Any, part: Part, dtype: torch.dtype) -> tuple[nn.Module, list[str]]:
    """Builds a VAE or a text encoder without ever holding its weights twice.

    Args:
        model: The class of diffusers or transformers.
        part: Of a single file.
        dtype: Of the weights as loaded.

    Returns:
        The part, and the names of weights that the file lacks or has in another shape.
    """
    if part.name.startswith("text_encoder"):
        return _load_text_encoder(model, part, dtype)
    with torch.device("meta"):
        built: nn.Module = model.from_config(dict(part.config))
    tensors = _as_diffusers(part)
    wanted = built.state_dict()
    missing = [name for name, at in wanted.items() if name not in tensors or tensors[name].shape != at.shape]
    if not missing:
        built.load_state_dict({name: tensors[name].to(dtype) for name in wanted}, assign=True)
    return built, missing


def _as_diffusers(part: Part) -> dict[str, Tensor]:
    """The tensors of a VAE by diffusers' names; it may have them already."""
    tensors = read_tensors(part)
    if any(name.startswith("encoder.down_blocks.") for name in tensors):
        return {_rename_attention(name): tensor for name, tensor in tensors.items()}
    return dict(convert_ldm_vae_checkpoint(tensors, dict(part.config)))


def _rename_attention(name: str) -> str:
    """`...attentions.0.query.weight`, as VAEs before 2023 have it, becomes `...attentions.0.to_q.weight`."""
    stem, _, rest = name.partition(".attentions.0.")
    old, _, kind = rest.partition(".")
    return f"{stem}.attentions.0.{OLD_ATTENTION[old]}.{kind}" if old in OLD_ATTENTION else name


def _load_text_encoder(model: Any, part: Part, dtype: torch.dtype) -> tuple[nn.Module, list[str]]:
    config = CLIPTextConfig(**part.config)
    tensors = read_tensors(part)
    if f"{part.prefix}positional_embedding" in tensors:
        with torch.device("meta"):
            renamed = convert_open_clip_checkpoint(model(config), tensors, prefix=part.prefix)
    else:
        bare = {name.removeprefix(part.prefix): tensor for name, tensor in tensors.items()}
        renamed = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in bare.items()}
    loaded, report = model.from_pretrained(
        None, config=config, state_dict=renamed, dtype=dtype, output_loading_info=True
    )
    return loaded, sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])


def read_tensors(part: Part) -> dict[str, Tensor]:
    """The part's tensors as they are named in the file; mapped, not read, until they are used."""
    with safe_open(part.files[0], framework="pt") as handle:
        names = [name for name in handle.keys() if name.startswith(part.prefix)]  # noqa: SIM118
        return {name: handle.get_tensor(name) for name in names}
