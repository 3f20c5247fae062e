"""Faster equivalents of a frozen UNet's layers on a CPU in bf16; those of attention are in `attention`.

B batch, C channels, O output channels, H W size, L tokens, D width.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from sdlora.models.attention import ContiguousHeads

# With few positions and many channels, one matrix product of unfolded taps beats oneDNN's convolution, which
# repacks its weights at every call.
MOST_POSITIONS = 16 * 16
LEAST_CHANNELS = 1024
TOLERANCE = 1e-3


class FrozenConvolution(nn.Conv2d):
    """A Conv2d whose weight is never trained: keeps nothing for the backward pass but the weight.

    Weights are stored channels_last, so that they are the matrix of an unfolded product without a copy.
    """

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = _FrozenConvolution.apply(x, self.weight, self.bias, self.stride, self.padding)
        return answer

    @staticmethod
    def suits(layer: nn.Module) -> bool:
        """Whether a layer is a plain, frozen convolution."""
        return (
            type(layer) is nn.Conv2d
            and layer.groups == 1
            and layer.dilation == (1, 1)
            and layer.padding_mode == "zeros"
            and not isinstance(layer.padding, str)
            and not layer.weight.requires_grad
        )


class PointwiseConvolution(FrozenConvolution):
    """A 1 x 1 convolution as one product, whose weight oneDNN does not repack."""

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        # As a matrix: of other shapes torch adds the bias to what it has rounded.
        rows = F.linear(x.permute(0, 2, 3, 1).reshape(-1, channels), self.weight.flatten(1), self.bias)
        return rows.view(batch, height, width, -1).permute(0, 3, 1, 2)

    @staticmethod
    def suits(layer: nn.Module) -> bool:
        """Whether a layer is such a convolution, and frozen."""
        if not isinstance(layer, nn.Conv2d) or not FrozenConvolution.suits(layer):
            return False
        return layer.kernel_size == layer.stride == (1, 1) and layer.padding == (0, 0)


class _FrozenConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, int],
        padding: tuple[int, int],
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.stride, ctx.padding = x.shape, stride, padding
        if _is_unfolded(weight, x.shape, stride, padding):
            return _unfold_and_multiply(x, weight, bias)
        return F.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        if _is_unfolded(weight, ctx.shape, ctx.stride, ctx.padding):
            return _unfold_and_multiply_back(gradient, weight), None, None, None, None
        x = gradient.new_empty(1).expand(ctx.shape)  # only its shape is read
        gradient_x = torch.ops.aten.convolution_backward(
            gradient, x, weight, None, ctx.stride, ctx.padding, (1, 1), False, (0, 0), 1, (True, False, False)
        )[0]
        return gradient_x, None, None, None, None


def _is_unfolded(
    weight: Tensor, shape: torch.Size, stride: tuple[int, int], padding: tuple[int, int]
) -> bool:
    is_same = tuple(weight.shape[2:]) == (3, 3) and tuple(stride) == tuple(padding) == (1, 1)
    return is_same and _is_wide(weight) and shape[0] * shape[2] * shape[3] <= MOST_POSITIONS


def _is_wide(weight: Tensor) -> bool:
    return min(weight.shape[:2]) >= LEAST_CHANNELS


def _unfold_and_multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 3 x 3 convolution of x (B, C, H, W) as one product (B H W, 9 C) @ (9 C, O)."""
    batch, channels, height, width = x.shape
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1)).contiguous()
    image, row, column, one = padded.stride()
    taps = padded.as_strided((batch, height, width, 3, 3, channels), (image, row, column, row, column, one))
    rows = F.linear(taps.reshape(-1, 9 * channels), weight.permute(0, 2, 3, 1).flatten(1), bias)
    return rows.view(batch, height, width, -1).permute(0, 3, 1, 2)


def _unfold_and_multiply_back(gradient: Tensor, weight: Tensor) -> Tensor:
    """The gradient (B, C, H, W) of x, as one product (B H W, 9 O) @ (9 O, C).

    It is a convolution of the gradient with the kernel turned by half a circle. The gradient is turned
    instead, and then the result, so that the weight (O, 3, 3, C) stays as it is stored.
    """
    taps = F.unfold(gradient.flip(2, 3), 3, padding=1)  # (B, 9 O, H W)
    turned = taps.new_empty(len(taps), taps.shape[2], taps.shape[1])
    for own, image in zip(turned, taps, strict=True):
        own.copy_(image.T)  # torch transposes single matrices 3 times quicker than batches of them
    rows = turned @ weight.permute(0, 2, 3, 1).flatten(0, 2)  # (B, H W, C)
    x: Tensor = rows.mT.unflatten(2, gradient.shape[2:]).flip(2, 3)
    return x


class ContiguousGate(GEGLU):  # type: ignore[misc]
    """A gated linear unit whose two halves are separate products of one frozen matrix.

    As halves of one product they are not contiguous, and torch's GELU then takes two to three times as long.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Hidden states (B, L, D) to (B, L, width)."""
        # Not an adapted or a quantized one.
        if type(self.proj) is not nn.Linear:
            answer: Tensor = super().forward(hidden_states)
        else:
            answer = _GatedProduct.apply(hidden_states, self.proj.weight, self.proj.bias)
        return answer

    @staticmethod
    def suits(layer: nn.Module) -> bool:
        """Whether a layer is a plain, frozen GEGLU."""
        return type(layer) is GEGLU and not any(one.requires_grad for one in layer.parameters())


class _GatedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        biases = (None, None) if bias is None else bias.chunk(2)
        hidden, gate = (F.linear(x, part, own) for part, own in zip(weight.chunk(2), biases, strict=True))
        factor = F.gelu(gate)
        if not ctx.needs_input_grad[0]:
            return hidden.mul_(factor)
        ctx.save_for_backward(weight, hidden, gate, factor)
        return hidden * factor

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, hidden, gate, factor = ctx.saved_tensors
        # One product, and so one rounding, as in torch.
        both = gradient.new_empty(*gradient.shape[:-1], len(weight))
        of_hidden, of_gate = both.chunk(2, -1)
        torch.mul(gradient, factor, out=of_hidden)
        of_gate.copy_(torch.ops.aten.gelu_backward(gradient * hidden, gate))
        return both @ weight, None, None


class ChannelsLastTransformer(Transformer2DModel):  # type: ignore[misc]
    """A transformer block that hands on its output in the layout in which it computes.

    diffusers' copies it to NCHW, and the convolution behind it copies it back: to the bit the same.
    """

    def _get_output_for_continuous_inputs(
        self, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, **_: Any
    ) -> Tensor:
        if self.use_linear_projection:
            hidden_states = self.proj_out(hidden_states)
        hidden_states = hidden_states.reshape(batch_size, height, width, -1).permute(0, 3, 1, 2)
        if not self.use_linear_projection:
            hidden_states = self.proj_out(hidden_states)
        return hidden_states + residual

    @staticmethod
    def suits(layer: nn.Module) -> bool:
        """Whether a layer is a transformer block of images."""
        return type(layer) is Transformer2DModel and bool(layer.is_input_continuous)


KINDS = (FrozenConvolution, PointwiseConvolution, ContiguousGate, ChannelsLastTransformer)


def use_cpu_kernels(unet: Any) -> bool:
    """Puts these and those of attention into a frozen UNet.

    Changes nothing and returns False if they do not agree with torch's.
    """
    # A 1 x 1 convolution suits two of them; the later one is taken.
    chosen = {layer: kind for kind in KINDS for layer in unet.modules() if kind.suits(layer)}
    convolutions: list[Any] = [layer for layer in chosen if isinstance(layer, nn.Conv2d)]
    gates = [layer for layer in chosen if isinstance(layer, GEGLU)]
    # One of each way of computing; the largest would take a second each.
    ways = {
        (layer.kernel_size, layer.stride, layer.padding, _is_wide(layer.weight)): layer
        for layer in sorted(convolutions, key=lambda one: -one.weight.numel())
    }
    narrowest = sorted(gates, key=lambda gate: gate.proj.in_features)[:1]
    inputs: list[tuple[nn.Module, tuple[int, ...]]]
    inputs = [(layer, (1, layer.in_channels, 8, 8)) for layer in ways.values()]
    inputs += [(gate, (1, 64, gate.proj.in_features)) for gate in narrowest]
    if not all(_agrees(layer, chosen[layer], shape) for layer, shape in inputs):
        return False
    for layer, kind in chosen.items():
        layer.__class__ = kind
    for convolution in convolutions:
        convolution.to(memory_format=torch.channels_last)
    for layer in unet.modules():
        if isinstance(getattr(layer, "processor", None), AttnProcessor2_0) and ContiguousHeads.suits(layer):
            layer.set_processor(ContiguousHeads())
    return True


def _agrees(layer: nn.Module, kind: type[nn.Module], shape: tuple[int, ...]) -> bool:
    """Whether output and input gradient of a layer are those of torch's own, for an input of a shape."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(next(layer.parameters()).dtype)
    results = []
    for compute in (layer.forward, partial(kind.forward, layer)):
        own = x.clone().requires_grad_()
        y = compute(own)
        (gradient,) = torch.autograd.grad(y, own, torch.ones_like(y))
        results.append((y.detach().float(), gradient.float()))
    return all(
        bool((ours - stock).norm() <= TOLERANCE * stock.norm()) for stock, ours in zip(*results, strict=True)
    )
