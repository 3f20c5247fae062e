"""Modules by the names that adapters use, in a denoiser alone or in the components of a pipeline.

Modules of the denoiser have their plain names. Those of text encoders start with the component, and always
have the level `text_model`, as in LoRA files: `text_encoder.text_model.encoder.layers.0.self_attn.q_proj`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeAlias

from torch import nn

from sdlora.lora.kinds import Layer
from sdlora.lora.layers import LoraLayer, can_carry

# The component that is trained on, by its name in files.
DENOISER = "unet"
TEXT_ENCODERS = ("text_encoder.", "text_encoder_2.")
LAYERS_PER_BLOCK = 2

Model: TypeAlias = nn.Module | Mapping[str, nn.Module]
"""A denoiser, or components such as `{"unet": …, "text_encoder": …, "text_encoder_2": …}`."""


def components(model: Model) -> dict[str, nn.Module]:
    """The components by name; a module alone is the denoiser."""
    return {DENOISER: model} if isinstance(model, nn.Module) else dict(model)


def named_modules(model: Model) -> Iterator[tuple[str, nn.Module]]:
    """Every module by the name that adapters use, but for the insides of wrapped layers.

    Newer transformers leave out CLIP's level `text_model` in one of their two classes; the names have it.
    """
    for component, network in components(model).items():
        # torch's own walk is nested generators, several times slower, and a switch of adapters is one walk.
        left: list[tuple[str, nn.Module]] = [("", network)]
        seen: set[nn.Module] = set()
        while left:
            path, module = left.pop()
            if module in seen:
                continue
            seen.add(module)
            yield module_name(component, path), module
            if not isinstance(module, LoraLayer):
                start = f"{path}." if path else ""
                left += [(start + name, child) for name, child in module.named_children()][::-1]


def carriers(model: Model) -> dict[str, nn.Module]:
    """What stands where a pair can be: a wrapped layer, or one that can be wrapped."""
    return {name: m for name, m in named_modules(model) if isinstance(m, LoraLayer) or can_carry(m)}


def carrier_layers(model: Model) -> dict[str, Layer]:
    """Every layer that can carry a pair, by name, as the base has it (wrapped or not)."""
    return {name: unwrap(module) for name, module in carriers(model).items()}


def unwrap(module: nn.Module) -> Layer:
    """The layer as the base has it."""
    layer = module.base if isinstance(module, LoraLayer) else module
    assert isinstance(layer, nn.Linear | nn.Conv2d), type(layer)
    return layer


def lora_layers(model: Model) -> dict[str, LoraLayer]:
    """The layers that are wrapped, by name."""
    return {name: m for name, m in named_modules(model) if isinstance(m, LoraLayer)}


def replace_modules(model: Model, modules: Mapping[str, nn.Module]) -> None:
    """Puts other modules in the places of those with these names."""
    for component, network in components(model).items():
        for path, _ in list(network.named_modules()):
            if replacement := modules.get(module_name(component, path)):
                parent, _, child = path.rpartition(".")
                setattr(network.get_submodule(parent), child, replacement)


def module_name(component: str, path: str) -> str:
    """The adapter's name of a module: plain in the denoiser, else with the component before it."""
    return path if component == DENOISER else with_text_model(f"{component}.{path}")


def component_of(module: str) -> str:
    """The part of a base that a module is in: `unet`, `text_encoder` or `text_encoder_2`."""
    return next((prefix[:-1] for prefix in TEXT_ENCODERS if module.startswith(prefix)), DENOISER)


def with_text_model(name: str) -> str:
    """A text encoder's module with the level `text_model`: newer transformers leave it out, files have it."""
    for component in TEXT_ENCODERS:
        if name.startswith(f"{component}encoder."):
            return f"{component}text_model.{name.removeprefix(component)}"
    return name
