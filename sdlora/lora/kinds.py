"""Adapter kinds: what an adapter does to one layer. Low-rank pairs (LoRA) are the first.

R rank; a Linear maps (..., in) to (..., out), a Conv2d (B, in, H, W) to (B, out, H', W'); kh and kw are its
kernel.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdlora.errors import AdapterError

Layer: TypeAlias = nn.Linear | nn.Conv2d
Scale: TypeAlias = float | Tensor
"""A factor for the whole batch, or (B,) one for each sample."""
Drop: TypeAlias = Callable[[Tensor], Tensor]


class AdapterModule(ABC):
    """The adapter of one layer: a dataclass whose fields are its trained tensors.

    The names of the fields are the parts of checkpoints and, through `formats.keys`, of LoRA files.
    """

    kind: ClassVar[str]
    """The value of `lora.kind`."""
    is_additive: ClassVar[bool]
    """Whether it adds `scale * delta` to any weight, so that adapters can be summed exactly."""
    file_parts: ClassVar[Sequence[set[str]]]
    """The sets of parts that a file may have for a module."""
    exact_parts: ClassVar[frozenset[str]] = frozenset()
    """Tensors that files keep in fp32 at any precision."""
    dialect_notes: ClassVar[Mapping[str, str]] = {}
    """Dialects that stock diffusers does not read whole, with a note on their readers."""
    network_module: ClassVar[str] = "networks.lora"
    """The kind in kohya's `ss_network_module`, with its arguments in `ss_network_args`."""
    network_args: ClassVar[Mapping[str, str]] = {}
    peft_settings: ClassVar[Mapping[str, bool]] = {}
    """Settings of PEFT's configuration that differ from the defaults."""

    @classmethod
    @abstractmethod
    def shapes(cls, layer: Layer, rank: int) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors for a layer, from its sizes alone: a 4-bit weight is packed."""

    @classmethod
    @abstractmethod
    def draw(cls, layer: Layer, rank: int, draw_down: Callable[[Sequence[int]], Tensor]) -> Self:
        """A fresh module that does not change the layer's output yet."""

    @classmethod
    @abstractmethod
    def from_file(cls, tensors: Mapping[str, Tensor]) -> Self | None:
        """A module from the tensors of a file; None if their shapes do not fit together."""

    def to_file(self, dialect: str) -> dict[str, Tensor]:
        """The tensors by part, in the shapes of a dialect."""
        return self.tensors()

    def fits_layer(self, layer: Layer) -> bool:
        """Whether it has the shapes that a layer needs."""
        shapes = self.shapes(layer, self.rank)
        return all(tuple(tensor.shape) == shapes[part] for part, tensor in self.tensors().items())

    @abstractmethod
    def with_kernel(self, is_convolution: bool) -> Self:
        """The same change with the factors of a 1x1 convolution, or of a linear layer; else itself."""

    @property
    @abstractmethod
    def rank(self) -> int: ...

    @property
    @abstractmethod
    def features(self) -> tuple[int, int]:
        """Features or channels of the layer's input and output."""

    @property
    @abstractmethod
    def starting_at_zero(self) -> Tensor:
        """The tensor that is zero in a fresh module; the first update must change it."""

    @abstractmethod
    def apply(self, x: Tensor, y: Tensor, layer: Layer, scale: Scale, drop: Drop | None) -> Tensor:
        """The layer's output with this module, from its input x and its output y with the modules below.

        The scale is strength times alpha / rank; `drop` is the dropout of the values between the factors.
        """

    @abstractmethod
    def delta_weight(self, weight: Tensor, scale: float, total: Tensor) -> Tensor:
        """The change of a layer's base weight, in its dtype; `total` has that of the modules below."""

    @abstractmethod
    def fold(self, scale: float) -> Self:
        """The same change at scale 1; scaled tensors become fp32."""

    @abstractmethod
    def pad(self, rank: int) -> Self:
        """The same change at a larger rank."""

    @abstractmethod
    def unpad(self, rank: int) -> Self:
        """The reverse of `pad`; itself if it was not padded to its rank from this one."""

    @abstractmethod
    def norm_squared(self) -> float:
        """The squared Frobenius norm of its change at scale 1."""

    @abstractmethod
    def distance_squared(self, other: Any) -> float:
        """The squared norm of the difference from another module of its kind, at scale 1."""

    @abstractmethod
    def limit_norm(self, max_norm: float, scale: float) -> Tensor:
        """Shrinks its change to a norm if that is larger; returns the norm before."""

    @classmethod
    def parts(cls) -> tuple[str, ...]:
        return tuple(field.name for field in fields(cls))  # type: ignore[arg-type]

    def tensors(self) -> dict[str, Tensor]:
        return {part: getattr(self, part) for part in self.parts()}

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """A copy with each tensor changed."""
        return type(self)(**{part: change(tensor) for part, tensor in self.tensors().items()})

    def round(self, dtype: torch.dtype) -> Self:
        """A copy in a dtype, except for its exact parts."""
        rounded = self.map(lambda tensor: tensor.to(dtype)).tensors()
        return type(self)(**rounded | {part: getattr(self, part) for part in self.exact_parts})

    def to(self, device: torch.device) -> Self:
        """On a device; tensors that are there already are shared."""
        return self.map(lambda tensor: tensor.to(device))

    @property
    def num_parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.tensors().values())

    @property
    def is_finite(self) -> bool:
        return all(bool(torch.isfinite(tensor).all()) for tensor in self.tensors().values())


@dataclass(slots=True)
class LowRank(AdapterModule):
    """A low-rank pair: adds `scale * up(down(x))` to the output (LoRA, arXiv 2106.09685, equation 3)."""

    kind = "lora"
    is_additive = True
    file_parts: ClassVar[Sequence[set[str]]] = ({"down", "up"},)

    down: Tensor
    """(R, in), or (R, in, kh, kw) for a convolution."""
    up: Tensor
    """(out, R), or (out, R, 1, 1) for a convolution."""

    @classmethod
    def shapes(cls, layer: Layer, rank: int) -> dict[str, tuple[int, ...]]:
        inputs, outputs = features_of(layer)
        if isinstance(layer, nn.Conv2d):
            return {"down": (rank, inputs, *layer.kernel_size), "up": (outputs, rank, 1, 1)}
        return {"down": (rank, inputs), "up": (outputs, rank)}

    @classmethod
    def draw(cls, layer: Layer, rank: int, draw_down: Callable[[Sequence[int]], Tensor]) -> Self:
        shapes = cls.shapes(layer, rank)
        return cls(draw_down(shapes["down"]), torch.zeros(shapes["up"]))

    @classmethod
    def from_file(cls, tensors: Mapping[str, Tensor]) -> Self | None:
        down, up = tensors["down"].shape, tensors["up"].shape
        fits = len(down) == len(up) and len(down) in (2, 4) and up[1] == down[0] and set(up[2:]) <= {1}
        return cls(**tensors) if fits else None

    def with_kernel(self, is_convolution: bool) -> Self:
        if is_convolution == (self.down.ndim == 4) or set(self.down.shape[2:]) - {1}:
            return self
        kernel = (1, 1) if is_convolution else ()
        down, up = (factor.reshape(*factor.shape[:2], *kernel) for factor in (self.down, self.up))
        return replace(self, down=down, up=up)

    @property
    def rank(self) -> int:
        return int(self.down.shape[0])

    @property
    def features(self) -> tuple[int, int]:
        return int(self.down.shape[1]), int(self.up.shape[0])

    @property
    def starting_at_zero(self) -> Tensor:
        return self.up

    def apply(self, x: Tensor, y: Tensor, layer: Layer, scale: Scale, drop: Drop | None) -> Tensor:
        if not isinstance(scale, Tensor) and scale == 0:
            return y
        return y + self.product(x, layer, scale, drop)

    def product(self, x: Tensor, layer: Layer, scale: Scale, drop: Drop | None) -> Tensor:
        """`scale * up(drop(down(x)))`; the factors go where `x` is, in its dtype, for the product alone."""
        if isinstance(layer, nn.Conv2d):
            hidden = F.conv2d(x, self.down.to(x), None, layer.stride, layer.padding, layer.dilation)
            hidden = (hidden * for_samples(scale, hidden)).to(hidden)
            return F.conv2d(drop(hidden) if drop else hidden, self.up.to(x))
        hidden = F.linear(x, self.down.to(x))
        hidden = (hidden * for_samples(scale, hidden)).to(hidden)
        return F.linear(drop(hidden) if drop else hidden, self.up.to(x))

    def delta_weight(self, weight: Tensor, scale: float, total: Tensor) -> Tensor:
        delta = as_float64(self.up) @ as_float64(self.down)
        return (scale * delta).reshape(weight.shape).to(weight)

    def fold(self, scale: float) -> Self:
        up = (as_float64(self.up) * scale).float().reshape(self.up.shape).to(self.up.device)
        return replace(self, up=up)

    def pad(self, rank: int) -> Self:
        return replace(self, down=pad(self.down, 0, rank), up=pad(self.up, 1, rank))

    def unpad(self, rank: int) -> Self:
        if not 1 <= rank < self.rank or self.down[rank:].any() or self.up[:, rank:].any():
            return self
        return replace(self, down=self.down[:rank].contiguous(), up=self.up[:, :rank].contiguous())

    def norm_squared(self) -> float:
        # From the two Gram matrices, (R, R), without forming the product.
        down, up = as_float64(self.down), as_float64(self.up)
        return max(float(((up.T @ up) * (down @ down.T)).sum()), 0.0)

    def distance_squared(self, other: LowRank) -> float:
        """That of a pair whose product is the difference of the two; exactly zero for equal pairs."""
        rank = max(self.rank, other.rank)
        down, other_down = (pad(as_float64(pair.down), 0, rank) for pair in (self, other))
        up, other_up = (pad(as_float64(pair.up), 1, rank) for pair in (self, other))
        downs, ups = torch.cat([down, down - other_down]), torch.cat([up - other_up, other_up], dim=1)
        return LowRank(downs, ups).norm_squared()

    def limit_norm(self, max_norm: float, scale: float) -> Tensor:
        """Multiplies both factors by the root of `max_norm / norm`, as kohya's tools do."""
        down, up = self.down.flatten(1), self.up.flatten(1)
        norm: Tensor = ((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt() * abs(scale)
        factor = (max_norm / norm.clamp(min=max_norm)).sqrt()
        self.down.mul_(factor)
        self.up.mul_(factor)
        return norm


def features_of(layer: Layer) -> tuple[int, int]:
    """Features or channels of a layer's input and output."""
    if isinstance(layer, nn.Conv2d):
        return layer.in_channels, layer.out_channels
    return layer.in_features, layer.out_features


def for_samples(scale: Scale, values: Tensor) -> Scale:
    """A scale for values (B, ...), sample by sample; guidance makes batches that repeat their samples."""
    if not isinstance(scale, Tensor):
        return scale
    parts, rest = divmod(len(values), len(scale))
    if rest:
        problem = f"{len(scale)} strengths for a batch of {len(values)}; pass one for each sample"
        raise AdapterError(problem, key="lora.strengths")
    return scale.to(values.device).repeat(parts).view(-1, *[1] * (values.ndim - 1))


def as_float64(factor: Tensor) -> Tensor:
    """A factor as a matrix in float64, on the CPU: MPS has none."""
    return factor.detach().cpu().double().flatten(1)


def pad(factor: Tensor, dim: int, size: int) -> Tensor:
    """Appends zeros along a dimension up to a size."""
    shape = list(factor.shape)
    shape[dim] = size - shape[dim]
    return torch.cat([factor, factor.new_zeros(shape)], dim=dim) if shape[dim] > 0 else factor
