"""Networks on the meta device, and their weights, read one tensor at a time.

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
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdlora.config import Quantize
from sdlora.dtypes import STORED
from sdlora.errors import ModelError, shorten
from sdlora.models.base import quiet
from sdlora.models.components import AGAIN, Component, read_header
from sdlora.models.info import BaseInfo
from sdlora.models.quantize import quantize, quantize_layer
from sdlora.models.stable_diffusion import StableDiffusion, wrap_denoiser
from sdlora.reading import Header

MODELS: dict[str, Any] = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
}
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# Errors of building a network from a damaged configuration.
UNFIT = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError),
    StrictDataclassError,
)


def read_tensors(part: Component, names: Mapping[str, str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Reads the tensors of a component in the order of their bytes.

    A mapped file counts as resident for as long as one of its tensors is in use. These are read, each into
    memory of its own. With `names`, new names by those in the file, other tensors are skipped.
    """
    for file in part.files:
        header = read_header(file)
        with file.open("rb") as handle:
            for stored in sorted(header.spans, key=lambda name: header.spans[name]):
                name = stored if names is None else names.get(stored)
                if name is not None and stored.startswith(part.prefix):
                    yield name, read_stored(handle, header, stored)


def read_stored(handle: BinaryIO, header: Header, stored: str) -> Tensor:
    """Reads one tensor of an open file."""
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
    layout: torch.memory_format = torch.preserve_format,
) -> list[str]:
    """Fills a network on the meta device with frozen weights, by the names in its state.

    A layer is quantized from the precision of the file, as soon as its weight is read; other weights get
    `dtype`, integers keep theirs; weights of convolutions get `layout`. A weight that is not finite is a
    ModelError that names the component.

    Returns:
        Names of the network's tensors that are missing, or have another shape.
    """
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    missing = dict.fromkeys(shapes)
    for name, tensor in tensors:
        if shapes.get(name) != tensor.shape:
            continue
        order = layout if tensor.ndim == 4 else torch.preserve_format
        kept = dtype if tensor.is_floating_point() else tensor.dtype
        value = tensor.to(device, kept, memory_format=order)
        check_finite(part, name, value)
        path, _, own = name.rpartition(".")
        layer = module.get_submodule(path)
        small = (
            quantize_layer(layer, tensor, scheme, device) if own == "weight" and scheme != "none" else None
        )
        if small is not None:
            module.set_submodule(path, small)
        else:
            is_parameter = own in layer._parameters
            setattr(layer, own, nn.Parameter(value, requires_grad=False) if is_parameter else value)
        missing.pop(name, None)
    return list(missing)


def check_finite(part: Component, name: str, weight: Tensor) -> None:
    """Refuses a weight with NaN or infinity, which would spoil every loss and every image.

    A sum needs no copy and is finite only if all its terms are. One in the weight's own dtype takes an eighth
    of the time; should it overflow, each weight is looked at.
    """
    if not torch.isfinite(weight.sum()) and not torch.isfinite(weight).all():
        raise ModelError(
            f"{part.path}: {name} of the {part.name} has NaN or infinity in "
            f"{str(weight.dtype).removeprefix('torch.')}; {AGAIN}, or use base.dtype=fp32",
            key="base.non-finite",
        )


def denoiser_names(part: Component) -> dict[str, str]:
    """Names in diffusers by the names of a UNet's tensors in a single file."""
    stored = {name: name for name in read_header(part.files[0]).shapes if name.startswith(part.prefix)}
    return {name: new for new, name in convert_ldm_unet_checkpoint(stored, dict(part.config)).items()}


def read_network(part: Component) -> Iterable[tuple[str, Tensor]]:
    """The tensors of a UNet or a VAE by their names in diffusers."""
    if part.name == "unet":
        return read_tensors(part, None if part.folder else denoiser_names(part))
    tensors = dict(read_tensors(part))
    if any(name.startswith("encoder.down_blocks.") for name in tensors):
        return [(_rename_attention(name), tensor) for name, tensor in tensors.items()]
    converted: dict[str, Tensor] = convert_ldm_vae_checkpoint(tensors, dict(part.config))
    return converted.items()


def _rename_attention(name: str) -> str:
    """`...attentions.0.query.weight`, as in VAEs before 2023, becomes `...attentions.0.to_q.weight`."""
    stem, _, rest = name.partition(".attentions.0.")
    old, _, kind = rest.partition(".")
    return f"{stem}.attentions.0.{OLD_ATTENTION[old]}.{kind}" if old in OLD_ATTENTION else name


def load_text_encoder(part: Component, dtype: torch.dtype) -> tuple[nn.Module, list[str]]:
    """A text encoder on the CPU, and the names of its tensors that the files lack."""
    tensors = dict(read_tensors(part))
    if f"{part.prefix}positional_embedding" in tensors:
        empty = empty_model(part.name, part.config)
        tensors = convert_open_clip_checkpoint(empty, tensors, prefix=part.prefix)
    elif part.folder is None:
        bare = {name.removeprefix(part.prefix): tensor for name, tensor in tensors.items()}
        tensors = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in bare.items()}
    try:
        config = CLIPTextConfig.from_dict(dict(part.config))
        with quiet():
            loaded, report = MODELS[part.name].from_pretrained(
                None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True
            )
    except UNFIT as error:
        raise ModelError(
            f"{part.path}: the {part.name} does not fit its configuration ({reason_of(error)}); {AGAIN}",
            key="base.mismatch",
        ) from None
    for name, weight in loaded.named_parameters():
        check_finite(part, name, weight)
    return loaded, [*report["missing_keys"], *map(str, report["mismatched_keys"])]


def empty_model(name: str, config: Mapping[str, Any]) -> Any:
    """One of `MODELS` without weights, on the meta device; raises a ModelError if it cannot be built."""
    try:
        with quiet(), torch.device("meta"):
            if name.startswith("text_encoder"):
                return MODELS[name](CLIPTextConfig.from_dict(dict(config)))
            return MODELS[name].from_config(dict(config))
    except UNFIT as error:
        raise ModelError(
            f"cannot build the base's {name} from its config.json ({reason_of(error)}); {AGAIN}",
            key="base.config",
        ) from None


def empty_denoiser(info: BaseInfo) -> UNet2DConditionModel:
    """The UNet on the meta device; raises a ModelError if its files have fewer parameters."""
    unet = empty_model("unet", info.denoiser_config)
    needed = sum(parameter.numel() for parameter in unet.parameters())
    if info.num_parameters < needed:
        raise ModelError(
            f"{info.path} is incomplete: its UNet has {info.num_parameters:,} parameters, "
            f"its configuration requires {needed:,}; {AGAIN}",
            key="base.incomplete",
        )
    return unet


def empty_components(info: BaseInfo, *, text: bool) -> dict[str, nn.Module]:
    """The UNet and, with `text`, the text encoders on the meta device, to find and count modules in.

    A layer that has no effect is left out (`BaseInfo.unread_layer`).
    """
    parts: dict[str, nn.Module] = {"unet": empty_denoiser(info)}
    for name in info.traits.text_encoders if text else ():
        config = dict(info.components[name].config)
        if info.unread_layer and info.unread_layer.startswith(f"{name}."):
            config["num_hidden_layers"] -= 1
        parts[name] = empty_model(name, config)
    return parts


def empty_base(info: BaseInfo, dtype: torch.dtype = torch.float32) -> StableDiffusion:
    """A base with a denoiser on the meta device, quantized as `info.quantize` requires."""
    denoiser = empty_denoiser(info)
    nn.Module.to(denoiser, dtype)
    if info.quantize != "none":
        # Every scheme dequantizes to the same weights, and this one needs no tables of another package.
        quantize(denoiser, "int8")
    return wrap_denoiser(info, denoiser.requires_grad_(False).eval())


def reason_of(error: Exception) -> str:
    """Another library's error on one line."""
    return shorten(" ".join(str(error).split()) or type(error).__name__)
