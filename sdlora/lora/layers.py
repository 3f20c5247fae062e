"""Frozen layers that carry a stack of low-rank pairs.

B batch, R rank; a Linear maps (..., in) to (..., out), a Conv2d (B, in, H, W) to (B, out, H', W').
The pairs are not parameters of the layer: moving or casting the network never touches an adapter, the
dtype of the network stays that of its base, and the base weight is never written, so that taking the
stack away gives the base back to the last bit.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch.nn.functional as F
from torch import Tensor, nn


class StackEntry(NamedTuple):
    """One low-rank pair at work: `scale * up(down(x))` is added to the layer's output."""

    down: Tensor
    up: Tensor
    scale: float


class LoraLinear(nn.Module):
    """`base(x) + sum of scale * up(down(x))` over the stack (LoRA, arXiv 2106.09685, equation 3).

    Args:
        base: The layer as it was; left untouched.
    """

    def __init__(self, base: nn.Linear) -> None:
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

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., in) to (..., out); the pairs are cast to `x.dtype` for the product."""
        y: Tensor = self.base(x)
        for down, up, scale in self.stack:
            if scale != 0:
                y = y + F.linear(F.linear(x, down.to(x.dtype)) * scale, up.to(x.dtype))
        return y


class LoraConv2d(nn.Module):
    """As `LoraLinear`: `down` has the base's kernel, stride and padding, `up` is 1x1.

    Args:
        base: The layer as it was; left untouched.
    """

    def __init__(self, base: nn.Conv2d) -> None:
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

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, in, H, W) to (B, out, H', W'); the pairs are cast to `x.dtype` for the product."""
        y: Tensor = self.base(x)
        for down, up, scale in self.stack:
            if scale != 0:
                hidden = F.conv2d(
                    x, down.to(x.dtype), None, self.base.stride, self.base.padding, self.base.dilation
                )
                y = y + F.conv2d(hidden * scale, up.to(x.dtype))
        return y


LoraLayer: TypeAlias = LoraLinear | LoraConv2d


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
