"""Frozen layers that carry a stack of adapter modules.

The modules are not parameters of the layer: moving or casting the network never touches an adapter, the
dtype of the network stays that of its base, and the base weight is never written, so that taking the
stack away gives the base back to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

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
