"""A frozen Linear and its low-rank pairs as one operation.

N tokens of all samples, R sum of the ranks of the pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Pair(NamedTuple):
    down: Tensor
    """(r, in), fp32"""
    up: Tensor
    """(out, r), fp32"""
    scale: float


def fused_linear(x: Tensor, weight: Tensor, bias: Tensor | None, pairs: Sequence[Pair]) -> Tensor:
    """`W x + b + sum of scale * up (down x)`, x (..., in) -> (..., out), in the dtype of x.

    As autograd would compute it, with fewer passes over memory: it keeps x and the product with `down`, adds
    in place, and multiplies all pairs of a stack at once. Only factors and x get gradients (LoRA, arXiv
    2106.09685, equation 3).
    """
    factors = [factor for pair in pairs for factor in (pair.down, pair.up)]
    answer: Tensor = _FusedLinear.apply(x, weight, bias, [pair.scale for pair in pairs], *factors)
    return answer


class _FusedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, scales: list[float], *factors: Tensor
    ) -> Tensor:
        rows = x.flatten(0, -2)
        down = _together([down.to(x.dtype) for down in factors[::2]], 0)
        ups = zip(factors[1::2], scales, strict=True)
        up = _together([(up * scale).to(x.dtype) for up, scale in ups], 1)
        hidden = rows @ down.T  # (N, R)
        y = F.linear(rows, weight, bias).addmm_(hidden, up.T)
        ctx.save_for_backward(rows, hidden, weight, down, up)
        ctx.scales, ctx.shape, ctx.ranks = scales, x.shape, [len(one) for one in factors[::2]]
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        rows, hidden, weight, down, up = ctx.saved_tensors
        gradient = gradient.flatten(0, -2)
        gradient_hidden = gradient @ up  # (N, R)
        gradient_x = None
        if ctx.needs_input_grad[0]:
            gradient_x = (gradient @ weight).addmm_(gradient_hidden, down).view(ctx.shape)
        gradients: list[Tensor | None] = []
        start = 0
        for number, (rank, scale) in enumerate(zip(ctx.ranks, ctx.scales, strict=True)):
            part = slice(start, start + rank)
            start += rank
            if ctx.needs_input_grad[4 + 2 * number]:
                of_down = gradient_hidden[:, part].T @ rows
                of_up = gradient.T @ hidden[:, part]
                gradients += [of_down.float(), of_up.float() * scale]
            else:
                gradients += [None, None]
        return gradient_x, None, None, None, *gradients


def _together(matrices: list[Tensor], dim: int) -> Tensor:
    return matrices[0] if len(matrices) == 1 else torch.cat(matrices, dim)
