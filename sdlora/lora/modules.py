"""Modules by the names that adapters use, in a UNet alone or in the components of a pipeline.

A UNet's modules have their plain names. Those of text encoders start with the component, and always have the
level `text_model`, as all LoRA files do: `text_encoder.text_model.encoder.layers.0.self_attn.q_proj`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeAlias

from torch import nn

from sdlora.lora.layers import LoraConv2d, LoraLayer, LoraLinear, can_carry
from sdlora.lora.names import module_name

Model: TypeAlias = nn.Module | Mapping[str, nn.Module]
"""A UNet, or components such as `{"unet": …, "text_encoder": …, "text_encoder_2": …}`."""


def components(model: Model) -> dict[str, nn.Module]:
    """The components by name; a module alone is the UNet."""
    return {"unet": model} if isinstance(model, nn.Module) else dict(model)


def named_modules(model: Model) -> Iterator[tuple[str, nn.Module]]:
    """Every module by the name that adapters use.

    Newer transformers leave out CLIP's level `text_model` in one of their two classes; the names have it.
    """
    for component, network in components(model).items():
        for path, module in network.named_modules():
            yield module_name(component, path), module


def carrier_layers(model: Model) -> dict[str, nn.Module]:
    """Every layer that can carry a pair, by name, as the base has it (wrapped or not)."""
    layers: dict[str, nn.Module] = {}
    for name, module in named_modules(model):
        if name.rpartition(".")[0] in layers:
            continue
        if isinstance(module, LoraLinear | LoraConv2d):
            layers[name] = module.base
        elif can_carry(module):
            layers[name] = module
    return layers


def lora_layers(model: Model) -> dict[str, LoraLayer]:
    """The layers that are wrapped, by name."""
    return {name: m for name, m in named_modules(model) if isinstance(m, LoraLinear | LoraConv2d)}


def replace_modules(model: Model, modules: Mapping[str, nn.Module]) -> None:
    """Puts other modules in the places of those with these names."""
    for component, network in components(model).items():
        for path, _ in list(network.named_modules()):
            if replacement := modules.get(module_name(component, path)):
                parent, _, child = path.rpartition(".")
                setattr(network.get_submodule(parent), child, replacement)
