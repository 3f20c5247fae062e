"""Faster equivalents of a UNet's attention on a CPU in bf16.

B batch, H heads, L queries, K keys, D width of a head.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor

# Scores that are in memory at once: two blocks of 8 MB in bf16.
BLOCK = 4 * 2**20
# With fewer, torch's own backward pass is as fast.
LEAST_TOKENS = 1024
TOLERANCE = 2e-2
# bf16 keeps 8 bits of a number, so three of them keep one in fp32.
_COLUMNS = 3


class ContiguousHeads(AttnProcessor2_0):  # type: ignore[misc]
    """Attention whose heads are contiguous in memory, which SDPA reads faster on a CPU."""

    def __init__(self, *, is_blocked: bool = False) -> None:
        super().__init__()
        self.is_blocked = is_blocked

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **arguments: Any,
    ) -> Tensor:
        """Hidden states (B, L, D) to (B, L, D)."""
        if attention_mask is not None:
            answer: Tensor = super().__call__(
                attn, hidden_states, encoder_hidden_states, attention_mask, **arguments
            )
            return answer
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            projection(states).unflatten(-1, (attn.heads, -1)).transpose(1, 2).contiguous()
            for projection, states in ((attn.to_q, hidden_states), (attn.to_k, source), (attn.to_v, source))
        )
        is_long = min(query.shape[2], key.shape[2]) >= LEAST_TOKENS
        if self.is_blocked and is_long and torch.is_grad_enabled():
            hidden = attend_in_blocks(query, key, value)
        else:
            hidden = F.scaled_dot_product_attention(query, key, value)
        projected: Tensor = attn.to_out[0](hidden.transpose(1, 2).flatten(2))
        return projected

    @staticmethod
    def suits(attn: Any) -> bool:
        """Whether a layer is plain attention, as in the UNets of Stable Diffusion."""
        extras = (attn.spatial_norm, attn.group_norm, attn.norm_q, attn.norm_k, attn.norm_cross)
        return not any(extras) and not attn.residual_connection and attn.rescale_output_factor == 1


def attend_in_blocks(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of query (B, H, L, D) to key and value (B, H, K, D), as torch computes it: (B, H, L, D).

    Its backward pass takes 0.7 of the time of torch's on a CPU whose products in bf16 are much faster than
    its other operations. There are as few of those as can be, all in bf16 (FlashAttention-2, arXiv
    2307.08691, algorithm 2): what is subtracted from scores and from their gradients is part of the
    products, as columns of the factors.
    """
    hidden: Tensor = _BlockedAttention.apply(query, key, value)
    return hidden


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # What SDPA calls for such tensors; it alone also returns the logarithm of each row's sum.
        hidden, log_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)
        ctx.save_for_backward(query, key, value, hidden, log_sums)
        answer: Tensor = hidden
        return answer

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, hidden, log_sums = ctx.saved_tensors
        scale = query.shape[-1] ** -0.5
        # A row's weights are computed as 2**power of what they are: exact, as a power of two is.
        power = _choose_powers(query, key, log_sums, scale)
        shrunk = gradient * torch.exp2(-power)[..., None].to(gradient.dtype)
        mean = (gradient.float() * hidden.float()).sum(-1) * torch.exp2(-power)
        queries = _with_columns(query, (power * math.log(2) - log_sums) / scale)
        gradients = _with_columns(shrunk, -mean)
        keys, values = (F.pad(one, (0, _COLUMNS), value=1.0) for one in (key, value))
        of_query, of_key, of_value = (torch.empty_like(one) for one in (query, key, value))
        num_queries, num_keys = query.shape[-2], key.shape[-2]
        most = min(num_keys, max(1, BLOCK // num_queries))
        # Products are faster with the scores transposed: two of three then read them row by row.
        scratch = query.new_empty(2, most, num_queries)
        unused = query.new_zeros(1)
        for head in ((sample, head) for sample in range(len(query)) for head in range(query.shape[1])):
            query_sum = query.new_zeros(query.shape[-2:], dtype=torch.float32)
            for start in range(0, num_keys, most):
                rows = (*head, slice(start, start + most))
                weights, slopes = scratch[:, : min(most, num_keys - start)]
                torch.addmm(
                    unused, keys[rows], queries[head].T, beta=0, alpha=scale / math.log(2), out=weights
                ).exp2_()
                torch.mm(values[rows], gradients[head].T, out=slopes).mul_(weights)
                torch.mm(weights, shrunk[head], out=of_value[rows])
                torch.addmm(unused, slopes, query[head], beta=0, alpha=scale, out=of_key[rows])
                query_sum += torch.addmm(unused, slopes.T, key[rows], beta=0, alpha=scale)
            of_query[head] = query_sum
        return of_query, of_key, of_value


def _with_columns(x: Tensor, rest: Tensor) -> Tensor:
    """x (B, H, L, D) with columns whose sum is `rest` (B, H, L), for a factor that has ones there."""
    columns = []
    for _ in range(_COLUMNS):
        columns.append(rest.to(x.dtype))
        rest = rest - columns[-1].float()
    return torch.cat([x, torch.stack(columns, -1)], -1)


def _choose_powers(query: Tensor, key: Tensor, log_sums: Tensor, scale: float) -> Tensor:
    """The power of two (B, H, L) that makes the exponents of the weights that count small, since small ones
    lose least in bf16.

    For normally distributed scores, the mean exponent of the weights lies above that of the keys by twice
    of what the logarithm of the mean weight does.
    """
    mean = (query.float() @ key.float().mean(-2)[..., None])[..., 0] * scale
    excess = log_sums - math.log(key.shape[-2]) - mean
    return ((log_sums - mean - 2 * excess).clamp_min(0) / math.log(2)).round()


def use_blocked_attention(unet: Any) -> bool:
    """Lets attention with contiguous heads compute its backward pass in blocks; False if it is wrong here."""
    if not _agrees():
        return False
    for layer in unet.modules():
        if isinstance(getattr(layer, "processor", None), ContiguousHeads):
            layer.processor.is_blocked = True
    return True


def has_fast_products() -> bool:
    """Whether this CPU has a unit for products in bf16 (AMX), as far as torch tells."""
    # Older versions of torch tell nothing.
    ask = getattr(torch.cpu, "get_capabilities", None)
    return ask is not None and bool(ask().get("amx_bf16"))


def _agrees() -> bool:
    """Whether gradients are those of torch, within what bf16 leaves of them, on 64 tokens."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(1, 2, 64, 40, generator=generator).to(torch.bfloat16) for _ in range(4)]
    results = []
    try:
        for attend in (F.scaled_dot_product_attention, attend_in_blocks):
            own = [one.clone().requires_grad_() for one in made[:3]]
            results.append(torch.autograd.grad(attend(*own), own, made[3]))
    except (AttributeError, RuntimeError):  # another torch has another operator
        return False
    pairs = zip(*results, strict=True)
    return all(float((own - stock).norm()) <= TOLERANCE * float(stock.norm()) for stock, own in pairs)
