"""Weights from files into networks, one tensor at a time: no second copy, no mapped file.

Tensors of a single file get their names in diffusers by its own conversions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO

import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig

from sdlora.config import Quantize
from sdlora.dtypes import STORED
from sdlora.errors import ModelError
from sdlora.models.components import Component, read_header
from sdlora.models.quantize import quantize_layer
from sdlora.reading import Header

OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def read_tensors(part: Component, names: Mapping[str, str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Reads the tensors of a part in the order of their bytes.

    A mapped file counts as resident for as long as one of its tensors is in use; these are read, each into
    memory of its own, and whoever takes them decides how long they stay.

    Args:
        part: Its files and prefix say which tensors.
        names: From those in the file to those wanted; the others are passed over. None: as they are.
    """
    for file in part.files:
        header = read_header(file)
        with file.open("rb") as handle:
            for stored in sorted(header.spans, key=lambda name: header.spans[name]):
                name = stored if names is None else names.get(stored)
                if name is not None and stored.startswith(part.prefix):
                    yield name, read_stored(handle, header, stored)


def read_stored(handle: BinaryIO, header: Header, stored: str) -> Tensor:
    """One tensor of an open file, in memory of its own."""
    start, size = header.spans[stored]
    handle.seek(start)
    content = torch.empty(size, dtype=torch.uint8)
    handle.readinto(content.numpy().data)  # type: ignore[attr-defined]
    return content.view(STORED[header.dtypes[stored]]).reshape(header.shapes[stored])


def fill(
    module: nn.Module,
    tensors: Iterable[tuple[str, Tensor]],
    part: Component,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    scheme: Quantize,
) -> list[str]:
    """Gives a network on the meta device its frozen weights.

    A layer that is quantised is so from the precision of the file, as soon as its weight has come.

    Args:
        module: Everything in it is on the meta device.
        tensors: By the names of its state; what it does not know is passed over.
        part: What it is, for the message of an error.
        dtype: Of all that is not quantised; whole numbers keep theirs.
        device: Where it shall be.
        scheme: How layers are quantised.

    Returns:
        What it still lacks: names that did not come, or came in another shape.

    Raises:
        ModelError: If a weight is not finite.
    """
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    missing = dict.fromkeys(shapes)
    for name, tensor in tensors:
        if shapes.get(name) == tensor.shape:
            value = tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device)
            check_finite(part, name, value)
            path, _, own = name.rpartition(".")
            layer = module.get_submodule(path)
            small = None
            if scheme != "none" and own == "weight":
                small = quantize_layer(layer, tensor, scheme, device)
            if small is None:
                _set(layer, own, value)
            else:
                parent, _, child = path.rpartition(".")
                setattr(module.get_submodule(parent), child, small)
            missing.pop(name, None)
    return list(missing)


def _set(layer: nn.Module, name: str, value: Tensor) -> None:
    if name in layer._parameters:
        value = nn.Parameter(value, requires_grad=False)
    setattr(layer, name, value)


def check_finite(part: Component, name: str, weight: Tensor) -> None:
    """Refuses a weight with a NaN or an infinity, which would spoil every loss and every image.

    A sum says so without a copy: it is finite only if all its terms are.

    Raises:
        ModelError: Naming it.
    """
    if not torch.isfinite(weight.sum(dtype=torch.float32)) and not torch.isfinite(weight).all():
        raise ModelError(
            f"{part.folder or part.files[0]}: {name} of the {part.name} holds NaN or infinity in "
            f"{str(weight.dtype).removeprefix('torch.')}; get the base again, or load it with base.dtype=fp32"
        )


def denoiser_names(part: Component) -> dict[str, str]:
    """From the names of a UNet's tensors in a single file to diffusers' own."""
    stored = {name: name for name in read_header(part.files[0]).shapes if name.startswith(part.prefix)}
    return {name: new for new, name in convert_ldm_unet_checkpoint(stored, dict(part.config)).items()}


def load_original(model: Any, part: Component, dtype: torch.dtype) -> tuple[nn.Module, list[str]]:
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


def _as_diffusers(part: Component) -> dict[str, Tensor]:
    """The tensors of a VAE by diffusers' names; it may have them already."""
    tensors = dict(read_tensors(part))
    if any(name.startswith("encoder.down_blocks.") for name in tensors):
        return {_rename_attention(name): tensor for name, tensor in tensors.items()}
    return dict(convert_ldm_vae_checkpoint(tensors, dict(part.config)))


def _rename_attention(name: str) -> str:
    """`...attentions.0.query.weight`, as VAEs before 2023 have it, becomes `...attentions.0.to_q.weight`."""
    stem, _, rest = name.partition(".attentions.0.")
    old, _, kind = rest.partition(".")
    return f"{stem}.attentions.0.{OLD_ATTENTION[old]}.{kind}" if old in OLD_ATTENTION else name


def _load_text_encoder(model: Any, part: Component, dtype: torch.dtype) -> tuple[nn.Module, list[str]]:
    config = CLIPTextConfig(**part.config)
    tensors = dict(read_tensors(part))
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
