"""Attention whose gradients are computed in blocks has the gradients of torch's own."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from sdlora.models import attention
from sdlora.models.attention import attend_in_blocks, use_blocked_attention
from sdlora.models.kernels import use_cpu_kernels


def make(queries=96, keys=96, spread=1.0, offset=0.0):
    """Query, key, value and gradient of the result: scores spread as much, keys with something in common."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((queries, spread), (keys, 1.0), (keys, 1.0), (queries, 1.0))
    made = [torch.randn(2, 2, count, 40, generator=generator) * size for count, size in sizes]
    made[1] += offset * torch.randn(40, generator=generator)
    return [one.to(torch.bfloat16) for one in made]


def gradients(attend, query, key, value, gradient):
    own = [one.clone().requires_grad_() for one in (query, key, value)]
    return torch.autograd.grad(attend(*own), own, gradient)


def errors(found, true):
    return [
        float((one.double() - other).norm() / other.norm()) for one, other in zip(found, true, strict=True)
    ]


@pytest.mark.parametrize(
    ("spread", "offset"), [(0.1, 0), (1, 0), (4, 0), (1, 3)], ids=["even", "usual", "peaked", "offset"]
)
def test_gradients_are_as_near_as_those_of_torch(spread, offset):
    """R-09 R-46: the error to float64 is that of torch in bf16, and at most 2.2 times as large."""
    made = make(spread=spread, offset=offset)
    true = gradients(F.scaled_dot_product_attention, *(one.double() for one in made))
    stock = errors(gradients(F.scaled_dot_product_attention, *made), true)
    ours = errors(gradients(attend_in_blocks, *made), true)
    assert all(own <= 2.2 * other for own, other in zip(ours, stock, strict=True)), (ours, stock)


def test_the_result_is_that_of_torch():
    """R-10: to the bit, so that samples and held-out losses do not change."""
    query, key, value, _ = make()
    assert torch.equal(attend_in_blocks(query, key, value), F.scaled_dot_product_attention(query, key, value))


@pytest.mark.parametrize(("queries", "keys"), [(96, 96), (70, 33), (33, 70)])
def test_blocks_join(queries, keys, monkeypatch):
    """R-09: blocks of any size, the last one smaller, have the gradients of a single one."""
    made = make(queries, keys)
    whole = gradients(attend_in_blocks, *made)
    monkeypatch.setattr(attention, "BLOCK", 20 * queries)
    assert max(errors(gradients(attend_in_blocks, *made), [one.double() for one in whole])) < 3e-3


def adapted_gradients(unet):
    generator = torch.Generator().manual_seed(1)
    weights = [
        one for name, one in unet.named_parameters() if ".attn1.to_" in name and name.endswith("weight")
    ]
    latents = torch.randn(2, 4, 8, 8, generator=generator).to(unet.dtype)
    hidden = torch.randn(2, 5, 24, generator=generator).to(unet.dtype)
    for weight in weights:
        weight.requires_grad_()
    output = unet(latents, torch.tensor([300, 700]), encoder_hidden_states=hidden).sample
    return torch.cat([one.flatten() for one in torch.autograd.grad(output.float().square().mean(), weights)])


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_a_whole_unet_agrees(make_unet, monkeypatch, checkpointing):
    """R-46: the gradient of all self-attention weights is that of torch's attention within rounding."""
    stock = make_unet().to(torch.bfloat16)
    assert use_cpu_kernels(stock)
    if checkpointing:
        stock.enable_gradient_checkpointing()
        stock.train()
    ours = copy.deepcopy(stock)
    assert use_blocked_attention(ours)
    monkeypatch.setattr(attention, "LEAST_TOKENS", 6)  # as many as self-attention has here, at least
    called, attend = [], attention.attend_in_blocks
    monkeypatch.setattr(attention, "attend_in_blocks", lambda *given: called.append(1) or attend(*given))
    theirs = adapted_gradients(stock).double()
    assert not called
    assert max(errors([adapted_gradients(ours)], [theirs])) < 5e-3
    assert called


def test_it_is_not_used_where_it_is_wrong(make_unet, monkeypatch):
    """R-46: gradients that disagree at the start leave torch's own."""
    unet = make_unet().to(torch.bfloat16)
    assert use_cpu_kernels(unet)
    monkeypatch.setattr(attention, "_choose_powers", lambda query, *_: torch.full(query.shape[:3], 140.0))
    assert not use_blocked_attention(unet)
    assert not any(processor.is_blocked for processor in unet.attn_processors.values())
