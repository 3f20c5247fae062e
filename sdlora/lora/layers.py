"""Frozen layers that carry a stack of low-rank pairs.

B batch, R rank; a Linear maps (..., in) to (..., out), a Conv2d (B, in, H, W) to (B, out, H', W').
The pairs are not parameters of the layer: moving or casting the network never touches an adapter, the
dtype of the network stays that of its base, and the base weight is never written, so that taking the
stack away gives the base back to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdlora.errors import AdapterError
from sdlora.seeds import name_seed

Scale: TypeAlias = float | Tensor
"""A factor for the whole batch, or (B,) one for each sample."""


class StackEntry(NamedTuple):
    """One low-rank pair at work: `scale * up(drop(down(x)))` is added to the layer's output."""

    down: Tensor
    up: Tensor
    scale: Scale
    drop: Callable[[Tensor], Tensor] | None = None

    @property
    def is_silent(self) -> bool:
        """Whether it adds nothing to any sample."""
        return not isinstance(self.scale, Tensor) and self.scale == 0

    def scaled(self, hidden: Tensor) -> Tensor:
        """What `up` is given: values of `down`, scaled and dropped out.

        A batch of several parts, as guidance makes, repeats the scales of its samples.

        Raises:
            AdapterError: If the batch is no multiple of the scales.
        """
        hidden = hidden * (self._scales(hidden) if isinstance(self.scale, Tensor) else self.scale)
        return self.drop(hidden) if self.drop else hidden

    def _scales(self, hidden: Tensor) -> Tensor:
        assert isinstance(self.scale, Tensor)
        parts, rest = divmod(len(hidden), len(self.scale))
        if rest:
            raise AdapterError(
                f"a batch of {len(hidden)} does not go with {len(self.scale)} strengths; "
                "give one for each sample"
            )
        return self.scale.to(hidden).repeat(parts).view(-1, *[1] * (hidden.ndim - 1))


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

    def of_module(self, name: str) -> Callable[[Tensor], Tensor] | None:
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

    base: nn.Linear | nn.Conv2d

    def __init__(self, base: nn.Linear | nn.Conv2d) -> None:
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


class LoraLinear(LoraLayer):
    """`base(x) + sum of scale * up(down(x))` over the stack (LoRA, arXiv 2106.09685, equation 3)."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., in) to (..., out); pairs go where `x` is, in its dtype, for the product."""
        y: Tensor = self.base(x)
        for entry in self.stack:
            if not entry.is_silent:
                hidden = entry.scaled(F.linear(x, entry.down.to(x)))
                y = y + F.linear(hidden, entry.up.to(x))
        return y


class LoraConv2d(LoraLayer):
    """As `LoraLinear`: `down` has the base's kernel, stride and padding, `up` is 1x1."""

    base: nn.Conv2d

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, in, H, W) to (B, out, H', W'); pairs go where `x` is, in its dtype, for the product."""
        base = self.base
        y: Tensor = base(x)
        for entry in self.stack:
            if not entry.is_silent:
                hidden = F.conv2d(x, entry.down.to(x), None, base.stride, base.padding, base.dilation)
                y = y + F.conv2d(entry.scaled(hidden), entry.up.to(x))
        return y


def wrap_layer(layer: nn.Module) -> LoraLayer:
    """A carrier for a Linear or Conv2d, with an empty stack."""
    if isinstance(layer, nn.Conv2d):
        return LoraConv2d(layer)
    assert isinstance(layer, nn.Linear), type(layer)
    return LoraLinear(layer)


def can_carry(layer: nn.Module) -> bool:
    """Whether a layer can carry low-rank pairs: a Linear, or a plain Conv2d with one group."""
    if isinstance(layer, nn.Conv2d):
        return layer.groups == 1 and layer.padding_mode == "zeros"
    return isinstance(layer, nn.Linear)


def pair_shapes(layer: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of `down` and `up` for a layer.

    They come from the layer's own sizes and not from its weight, since a 4-bit weight is packed.
    """
    if isinstance(layer, nn.Conv2d):
        height, width = layer.kernel_size[0], layer.kernel_size[1]
        return (rank, layer.in_channels, height, width), (layer.out_channels, rank, 1, 1)
    assert isinstance(layer, nn.Linear), type(layer)
    return (rank, layer.in_features), (layer.out_features, rank)
