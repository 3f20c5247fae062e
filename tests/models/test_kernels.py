"""The faster kernels of a CPU compute what torch and diffusers compute."""

from __future__ import annotations

import copy
import platform
import resource
from contextlib import nullcontext

import pytest
import torch
from diffusers.models.activations import GEGLU
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from sdlora.models import kernels
from sdlora.models.attention import ContiguousHeads
from sdlora.models.base import freed_memory_kept
from sdlora.models.kernels import (
    ChannelsLastTransformer,
    ContiguousGate,
    FrozenConvolution,
    PointwiseConvolution,
    use_cpu_kernels,
)

WIDE = kernels.LEAST_CHANNELS
REPLACED = {
    nn.Conv2d: {FrozenConvolution, PointwiseConvolution},
    GEGLU: {ContiguousGate},
    Transformer2DModel: {ChannelsLastTransformer},
}
LAYERS = {
    "unfolded": (nn.Conv2d(WIDE, WIDE + 8, 3, padding=1), 6),
    "too large": (nn.Conv2d(8, 16, 3, padding=1), 20),
    "strided": (nn.Conv2d(16, 16, 3, stride=2, padding=1), 8),
    "pointwise": (nn.Conv2d(16, 8, 1, bias=False), 8),
}


@pytest.mark.parametrize("name", LAYERS)
def test_convolutions_equal_torch(name):
    """R-09: output and input gradient, in float64; the layer keeps nothing but its weight."""
    stock, side = LAYERS[name]
    stock = stock.double().requires_grad_(False)
    ours = copy.deepcopy(stock).to(memory_format=torch.channels_last)
    kind = PointwiseConvolution if PointwiseConvolution.suits(ours) else FrozenConvolution
    assert kind.suits(ours)
    ours.__class__ = kind
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, stock.in_channels, side, side + 1, generator=generator, dtype=torch.float64)
    results = []
    for layer in (stock, ours):
        own, kept = x.clone().requires_grad_(), []
        with saved_tensors_hooks(lambda tensor, kept=kept: kept.append(tensor.numel()), lambda _: None):
            layer(own)
        y = layer(own)
        (gradient,) = torch.autograd.grad(y, own, torch.ones_like(y))
        results.append((y.detach(), gradient))
    for theirs, own in zip(*results, strict=True):
        assert float((own - theirs).norm() / theirs.norm()) < 1e-12
    assert kept == [stock.weight.numel()]


@pytest.mark.parametrize("bias", [True, False])
def test_gates_equal_diffusers(bias):
    """R-09: output and input gradient, in float64."""
    stock = GEGLU(24, 40, bias=bias).double().requires_grad_(False)
    ours = copy.deepcopy(stock)
    assert ContiguousGate.suits(ours)
    ours.__class__ = ContiguousGate
    x = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    results = []
    for layer in (stock, ours):
        own = x.clone().requires_grad_()
        y = layer(own)
        with torch.no_grad():
            alone = layer(x)
        results.append((y.detach(), alone, *torch.autograd.grad(y.sin().sum(), own)))
    for theirs, own in zip(*results, strict=True):
        assert float((own - theirs).norm() / theirs.norm()) < 1e-12


def test_an_adapted_gate_is_computed_as_any():
    """R-09: with another layer in place of its projection, the gate is diffusers' own."""

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    stock = GEGLU(24, 40).requires_grad_(False)
    stock.proj.__class__ = Doubled
    ours, x = copy.deepcopy(stock), torch.randn(2, 9, 24)
    ours.__class__ = ContiguousGate
    assert torch.equal(ours(x), stock(x))


@pytest.mark.parametrize("linear", [True, False])
def test_a_transformer_block_equals_diffusers(linear):
    """R-09: to the bit, and channels_last as its input is."""
    torch.manual_seed(0)
    stock = Transformer2DModel(2, 16, 32, norm_num_groups=8, use_linear_projection=linear)
    ours = copy.deepcopy(stock)
    assert ChannelsLastTransformer.suits(ours)
    ours.__class__ = ChannelsLastTransformer
    x = torch.randn(2, 32, 6, 4).to(memory_format=torch.channels_last)
    theirs, own = (layer(x, return_dict=False)[0] for layer in (stock, ours))
    assert torch.equal(own, theirs)
    assert own.is_contiguous(memory_format=torch.channels_last)


def test_a_whole_unet_agrees(make_unet, run):
    """R-46: in bf16, the UNet's output is that of the stock kernels within bf16's rounding."""
    stock, ours = make_unet().to(torch.bfloat16), make_unet().to(torch.bfloat16)
    assert use_cpu_kernels(ours)
    for stock_kind, own_kinds in REPLACED.items():
        assert {type(layer) for layer in ours.modules() if isinstance(layer, stock_kind)} == own_kinds
    assert all(isinstance(one, ContiguousHeads) for one in ours.attn_processors.values())
    state = {name: value.clone() for name, value in ours.state_dict().items()}
    assert all(torch.equal(value, state[name]) for name, value in stock.state_dict().items())
    theirs, own = run(stock).float(), run(ours).float()
    assert float((own - theirs).norm() / theirs.norm()) < 1e-2


def test_kernels_that_disagree_are_not_used(make_unet, monkeypatch):
    """R-46: a wrong result at the start leaves the stock kernels."""
    unet = make_unet().to(torch.bfloat16)
    stock = nn.functional.conv2d
    monkeypatch.setattr(kernels.F, "conv2d", lambda x, weight, *rest: stock(x, weight * 1.01, *rest))
    assert not use_cpu_kernels(unet)
    assert not any(isinstance(layer, FrozenConvolution) for layer in unet.modules())


def new_pages(context, times=8):
    """Pages of new memory for a large tensor that is made and freed a few times, once it has been before."""
    with context:
        for number in range(2 * times):
            if number == times:
                before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            torch.ones(40 * 2**20, dtype=torch.uint8)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have no such thresholds")
def test_a_large_tensor_takes_the_place_of_the_last_one():
    """It takes no new memory; without, all of it is new."""
    plain = new_pages(nullcontext())
    assert new_pages(freed_memory_kept()) * 2 < plain
