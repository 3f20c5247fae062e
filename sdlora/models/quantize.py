"""Frozen layers in 8 or 4 bits, dequantized for each product (int8, or NF4 as in QLoRA).

A Linear maps (..., in) to (..., out), a Conv2d (B, in, H, W) to (B, out, H', W').
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from sdlora.config import Quantize

try:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit
except ImportError:
    # Only NF4 needs it, and `inspect_base` refuses that without the package.
    dequantize_4bit = quantize_4bit = None

BLOCK = 64
SMALLEST = 4096
NARROWEST = 16
KINDS = (nn.Linear, nn.Conv2d)
CONV_SETTINGS = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")


class Int8:
    """Integers up to 127, and one scale per output (absmax, arXiv 2208.07339, section 2)."""

    def __init__(self, weight: Tensor) -> None:
        values = weight.float()
        scale = values.abs().amax(tuple(range(1, weight.dim())), keepdim=True) / 127
        self.scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
        self.quantized = (values / self.scale).round_().to(torch.int8)

    def dequantize(self, quantized: Tensor, dtype: torch.dtype) -> Tensor:
        return quantized.to(dtype).mul_(self.scale.to(dtype))

    def to(self, device: torch.device) -> None:
        self.scale = self.scale.to(device)

    @staticmethod
    def num_bytes(shape: torch.Size) -> int:
        return prod(shape) + 4 * shape[0]


class Nf4:
    """NF4 of a Linear's weight in blocks of 64, with quantized scales (arXiv 2305.14314, 3.1 and 3.2).

    bitsandbytes does the arithmetic. Its own layer is not used: on some CPUs it repacks its weight for
    inference on its first use without gradients, after which a backward pass fails.
    """

    def __init__(self, weight: Tensor) -> None:
        self.quantized, self.state = quantize_4bit(
            weight.contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
        )

    def dequantize(self, quantized: Tensor, dtype: torch.dtype) -> Tensor:
        self.state.dtype = dtype
        weight: Tensor = dequantize_4bit(quantized, self.state)
        return weight

    def to(self, device: torch.device) -> None:
        self.state.to(device)

    @staticmethod
    def num_bytes(shape: torch.Size) -> int:
        """Half a byte per weight, a byte for the scale of a block, four for each 256 of those."""
        blocks = prod(shape) // BLOCK
        return prod(shape) // 2 + blocks + 4 * -(-blocks // 256)


class _Product(torch.autograd.Function):
    """A product with a frozen weight that is dequantized again for the backward pass.

    Autograd would keep every dequantized weight until then, and the input of a convolution as well.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear | QuantizedConv2d) -> Tensor:
        ctx.layer, ctx.shape, ctx.dtype = layer, x.shape, x.dtype
        # The meta device has no autocast.
        kind, dtype = x.device.type, x.dtype
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        bias = None if layer.bias is None else layer.bias.to(dtype)
        return layer.multiply(x.to(dtype), layer.dequantize(dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        weight = ctx.layer.dequantize(gradient.dtype)
        return ctx.layer.input_gradient(gradient, weight, ctx.shape).to(ctx.dtype), None


class _Quantized(nn.Module):
    """A frozen layer whose `codec` dequantizes its `weight`."""

    weight: Any
    codec: Int8 | Nf4

    def store(self, layer: nn.Linear | nn.Conv2d, codec: Int8 | Nf4) -> None:
        self.codec = codec
        self.register_parameter("bias", layer._parameters["bias"])
        self.weight = nn.Parameter(codec.quantized, requires_grad=False)
        del codec.quantized

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight of the layer that was replaced, but for rounding."""
        return self.codec.dequantize(self.weight, dtype)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Product.apply(x, self)
        return y

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.codec.to(self.weight.device)
        return self


class QuantizedLinear(_Quantized, nn.Linear):
    """A frozen Linear that replaces a layer, whose own weight may be on the meta device."""

    def __init__(self, layer: nn.Linear, codec: Int8 | Nf4) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.store(layer, codec)

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def input_gradient(self, gradient: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        return gradient @ weight


class QuantizedConv2d(_Quantized, nn.Conv2d):
    """A frozen Conv2d; as `QuantizedLinear`."""

    def __init__(self, layer: nn.Conv2d, codec: Int8 | Nf4) -> None:
        sizes: dict[str, Any] = {name: getattr(layer, name) for name in CONV_SETTINGS}
        super().__init__(**sizes, bias=False, device="meta")
        self.store(layer, codec)

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation)

    def input_gradient(self, gradient: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        back: Any = conv2d_input
        result: Tensor = back(shape, weight, gradient, self.stride, self.padding, self.dilation)
        return result


def choose_codec(layer: nn.Module, scheme: Quantize) -> type[Int8] | type[Nf4] | None:
    """The codec for the weight of a layer, or None for a layer that is not quantized.

    Small layers and those with few channels (the first and the last) need little memory and matter most.
    A convolution never gets 4 bits: on trained weights they change the prediction 30 times as much as 8 bits.
    """
    if scheme == "none" or type(layer) not in KINDS:
        return None
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    shape = layer.weight.shape
    if prod(shape) < SMALLEST or min(shape[:2]) < NARROWEST:
        return None
    if isinstance(layer, nn.Conv2d):
        plain = layer.groups == 1 and layer.padding_mode == "zeros" and isinstance(layer.padding, tuple)
        return Int8 if plain else None
    return Nf4 if scheme == "nf4" and prod(shape) % BLOCK == 0 else Int8


def quantize_layer(
    layer: nn.Module, weight: Tensor, scheme: Quantize, device: torch.device | str | None = None
) -> nn.Module | None:
    """The frozen, quantized layer for a weight, or None if `choose_codec` has no codec for it.

    The layer that it replaces may be on the meta device. The weight is quantized, and stays, on `device`.
    """
    codec = choose_codec(layer, scheme)
    if codec is None:
        return None
    kind: Any = QuantizedConv2d if isinstance(layer, nn.Conv2d) else QuantizedLinear
    small: QuantizedLinear | QuantizedConv2d = kind(layer, codec(weight.to(device=device)))
    return small.train(layer.training)


def quantize(module: nn.Module, scheme: Quantize) -> None:
    """Replaces the layers of a network in place."""
    for name, layer in list(module.named_modules()):
        small = quantize_layer(layer, layer.weight.data, scheme) if isinstance(layer, KINDS) else None
        if small is not None:
            module.set_submodule(name, small)


@dataclass(slots=True)
class LayerBytes:
    """Bytes of one kind of layers, before and after quantization."""

    plain: int = 0
    stored: int = 0


def bytes_by_kind(module: nn.Module, dtype: torch.dtype, scheme: Quantize) -> dict[str, LayerBytes]:
    """Bytes of the weights of an unquantized network in a dtype, and after quantization, by kind of layer."""
    sizes = {kind: LayerBytes() for kind in ("linear", "convolution", "rest")}
    for layer in module.modules():
        kind = {nn.Linear: "linear", nn.Conv2d: "convolution"}.get(type(layer), "rest")
        codec = choose_codec(layer, scheme)
        for name, tensor in [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]:
            plain = tensor.numel() * (dtype.itemsize if tensor.is_floating_point() else tensor.element_size())
            part = sizes[kind if name == "weight" else "rest"]
            part.plain += plain
            part.stored += codec.num_bytes(tensor.shape) if codec and name == "weight" else plain
    return sizes
