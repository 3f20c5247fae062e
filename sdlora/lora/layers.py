"""Frozen layers that carry a stack of adapter modules.

The modules are not parameters of the layer: moving or casting the network never touches an adapter, the
dtype of the network stays that of its base, and the base weight is never written, so that taking the
stack away gives the base back to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from sdlora.lora.kinds import AdapterModule, Drop, Layer, Scale
from sdlora.seeds import name_seed


class StackEntry(NamedTuple):
    """One module of an adapter at work."""

    module: AdapterModule
    scale: Scale
    drop: Drop | None = None


class Dropout:
    """Dropout of the values between down and up, as a function of sample and module alone.

    Neither the ambient generator nor the number of processes changes it, and gradient checkpointing draws it
    again alike (R-03, R-04). It is off but inside `drawn`, so that only training knows it.

    Args:
        share: Of the values that become zero; the others grow by 1 / (1 - share).
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self.seeds: tuple[int, ...] = ()

    @contextmanager
    def drawn(self, seeds: Sequence[int]) -> Iterator[None]:
        """Forward and backward passes of a batch: one seed for each of its samples."""
        before, self.seeds = self.seeds, tuple(seeds)
        try:
            yield
        finally:
            self.seeds = before

    def of_module(self, name: str) -> Drop | None:
        """What drops values (B, ...) of a module; None if nothing is ever dropped."""
        if self.share == 0:
            return None
        key = name_seed(name)

        def drop(values: Tensor) -> Tensor:
            if not self.seeds:
                return values
            assert len(values) == len(self.seeds), f"{name} sees {len(values)} of {len(self.seeds)} samples"
            generators = (torch.Generator(values.device).manual_seed(seed ^ key) for seed in self.seeds)
            noise = [torch.rand(values.shape[1:], generator=one, device=values.device) for one in generators]
            keep = torch.stack(noise) >= self.share
            return values * keep.to(values.dtype) / (1 - self.share)

        return drop


class LoraLayer(nn.Module):
    """A frozen layer with a stack. Its state is the layer's, under the layer's names.

    So a network that carries adapters is saved and loaded as its base: what is mounted is a file of its own.

    Args:
        base: The layer as it was; left untouched.
    """

    def __init__(self, base: Layer) -> None:
        super().__init__()
        self.base = base
        self.stack: tuple[StackEntry, ...] = ()

    @property
    def weight(self) -> Tensor:
        """The base's weight; other code asks a layer for its dtype and device by it."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return self.base.bias

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """That of the base."""
        return self.base.state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Passes what is for the layer down to it."""
        for key in [key for key in state_dict if key.startswith(prefix)]:
            state_dict[f"{prefix}base.{key.removeprefix(prefix)}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor) -> Tensor:
        """The base's output with the modules of the stack, one after the other."""
        y: Tensor = self.base(x)
        for entry in self.stack:
            y = entry.module.apply(x, y, self.base, entry.scale, entry.drop)
        return y


def can_carry(layer: nn.Module) -> bool:
    """Whether a layer can carry an adapter: a Linear, or a plain Conv2d with one group."""
    if isinstance(layer, nn.Conv2d):
        return layer.groups == 1 and layer.padding_mode == "zeros"
    return isinstance(layer, nn.Linear)


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
