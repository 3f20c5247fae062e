"""Networks without weights, to count and plan with, and the weights that fill them, one tensor at a time.

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
from sdlora.models.components import Component, read_header
from sdlora.models.info import BaseInfo
from sdlora.models.quantize import quantize, quantize_layer
from sdlora.models.stable_diffusion import StableDiffusion, wrap_denoiser
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
