"""Small layers: what they keep, what they answer, what they leave alone."""

from __future__ import annotations

import copy
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn

from sdlora.models.info import BaseInfo
from sdlora.models.load import load_base
from sdlora.models.quantize import (
    Int8,
    Nf4,
    bytes_by_kind,
    choose_codec,
    quantize,
    quantize_layer,
)
from sdlora.models.stable_diffusion import StableDiffusion
from sdlora.models.weights import empty_denoiser

SCHEMES = ["int8", "nf4"]


def small(layer: nn.Module, scheme: str = "int8") -> Any:
    made = quantize_layer(layer, layer.weight.data, scheme)
    assert made is not None
    return made


def conv(**options: Any) -> nn.Conv2d:
    return nn.Conv2d(32, 48, 3, **options).requires_grad_(False)


LAYERS = {
    "linear": (lambda: nn.Linear(96, 64), (2, 5, 96)),
    "without bias": (lambda: nn.Linear(96, 64, bias=False), (3, 96)),
    "convolution": (lambda: conv(padding=1), (2, 32, 9, 7)),
    "stride": (lambda: conv(stride=2, padding=1), (1, 32, 10, 9)),
    "dilation": (lambda: conv(dilation=2, padding=(2, 0), bias=False), (1, 32, 8, 8)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_eight_bits_are_the_nearest_of_255_steps(name: str) -> None:
    """R-48: no weight is off by more than half a step, a 254th of the largest of its output."""
    layer = LAYERS[name][0]()
    expanded = small(layer).dequantize(torch.float32)
    step = layer.weight.abs().flatten(1).amax(1) / 127
    error = (expanded - layer.weight).abs().flatten(1).amax(1)
    assert (error <= 0.501 * step).all()
    assert error.max() > 0.4 * step.max()


@pytest.mark.parametrize("name", LAYERS)
def test_answer_and_gradient_are_those_of_the_expanded_weight(name: str) -> None:
    """R-09: expanding a second time for the backward pass changes nothing."""
    make, shape = LAYERS[name]
    layer = make().requires_grad_(False)
    packed = small(layer)
    plain = copy.deepcopy(layer)
    plain.weight.data = packed.dequantize(torch.float32)
    x = torch.randn(shape, requires_grad=True)
    other = x.detach().clone().requires_grad_(True)
    answer, expected = packed(x), plain(other)
    # A weight in another buffer may take another kernel.
    torch.testing.assert_close(answer, expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn_like(answer)
    (answer * weights).sum().backward()
    (expected * weights).sum().backward()
    assert torch.allclose(x.grad, other.grad, rtol=1e-5, atol=1e-6)


def test_four_bits_are_those_of_bitsandbytes() -> None:
    """R-48: its own layer, with double quantisation, is the oracle: the same answer and gradient."""
    layer = nn.Linear(128, 96)
    oracle = bitsandbytes.nn.Linear4bit(128, 96, compute_dtype=torch.float32, quant_type="nf4")
    oracle.load_state_dict(layer.state_dict())
    oracle.to("cpu")
    oracle.support_avx512bf16_for_cpu = False
    packed = small(layer.requires_grad_(False), "nf4")
    x = torch.randn(4, 128, requires_grad=True)
    other = x.detach().clone().requires_grad_(True)
    answer, expected = packed(x), oracle(other)
    # The weights are the same bits, the products are two libraries'.
    torch.testing.assert_close(answer, expected, rtol=1e-5, atol=1e-5)
    answer.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-4, atol=1e-4)
    relative = (packed.dequantize(torch.float32) - layer.weight).norm() / layer.weight.norm()
    assert 0.03 < relative < 0.12


@pytest.mark.parametrize("name", LAYERS)
def test_nothing_is_kept_for_the_backward_pass(name: str) -> None:
    """R-18: neither the expanded weight nor the input waits in memory."""
    make, shape = LAYERS[name]
    kept: list[Tensor] = []
    x = torch.randn(shape, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda nothing: nothing):
        small(make().requires_grad_(False))(x)
    assert not kept


@pytest.mark.parametrize(
    ("layer", "scheme", "expected"),
    [
        (nn.Linear(64, 64), "nf4", Nf4),
        (nn.Linear(64, 64), "int8", Int8),
        (nn.Linear(65, 65), "nf4", Int8),
        (nn.Linear(63, 65), "nf4", None),
        (nn.Linear(1024, 8), "nf4", None),
        (nn.Conv2d(64, 64, 3), "nf4", Int8),
        (nn.Conv2d(320, 4, 3), "int8", None),
        (nn.Conv2d(4, 320, 3), "int8", None),
        (nn.Conv2d(64, 64, 3, groups=2), "int8", None),
        (nn.Conv2d(64, 64, 3, padding="same"), "int8", None),
        (nn.Conv2d(64, 64, 3, padding=1, padding_mode="reflect"), "int8", None),
        (nn.Embedding(64, 64), "int8", None),
        (nn.GroupNorm(8, 4096), "int8", None),
    ],
)
def test_what_is_left_alone(layer: nn.Module, scheme: Any, expected: type | None) -> None:
    """R-48: small and narrow layers, odd convolutions and everything else stay; 65 x 65 fills no blocks."""
    assert choose_codec(layer, scheme) is expected
    assert (quantize_layer(layer, layer.weight.data, scheme) is None) == (expected is None)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_bytes_are_known_before_anything_is_loaded(info: BaseInfo, scheme: Any) -> None:
    """R-48: what the plan states, part by part, is what is then stored."""
    unet = load_base(info, dtype=torch.bfloat16, device="cpu").denoiser
    planned = bytes_by_kind(empty_denoiser(info), torch.bfloat16, scheme)
    assert bytes_by_kind(unet, torch.bfloat16, scheme) == planned
    tensors = [*unet.parameters(), *unet.buffers()]
    assert sum(part.plain for part in planned.values()) == sum(t.numel() * t.element_size() for t in tensors)
    quantize(unet, scheme)
    stored = [*unet.parameters(), *unet.buffers()]
    for layer in unet.modules():
        codec = getattr(layer, "codec", None)
        if isinstance(codec, Nf4):
            stored += [codec.state.absmax, codec.state.state2.absmax]
        if isinstance(codec, Int8):
            stored.append(codec.scale)
    assert sum(part.stored for part in planned.values()) == sum(t.numel() * t.element_size() for t in stored)
    plain = bytes_by_kind(empty_denoiser(info), torch.bfloat16, "none")
    assert all(part.plain == part.stored == planned[name].plain for name, part in plain.items())


def denoise(base: StableDiffusion, unet: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    weight = unet.conv_in.weight
    latents = torch.randn(2, base.info.latent_channels, 16, 16, generator=generator)
    hidden = torch.randn(2, 8, base.info.denoiser_config["cross_attention_dim"], generator=generator)
    timesteps = torch.tensor([400, 800])
    answer: Tensor = unet(latents.to(weight), timesteps, hidden.to(weight), return_dict=False)[0].float()
    return answer


@pytest.mark.parametrize(("scheme", "low", "high"), [("int8", 0.002, 0.03), ("nf4", 0.05, 0.3)])
def test_a_trained_unet_answers_nearly_the_same(
    base: StableDiffusion, scheme: Any, low: float, high: float
) -> None:
    """R-48: the error of 8 bits is small, that of 4 bits 10 times larger; both are there, twice the same."""
    with torch.no_grad():
        expected = denoise(base, base.denoiser)
        first, second = copy.deepcopy(base.denoiser), copy.deepcopy(base.denoiser)
        quantize(first, scheme)
        quantize(second, scheme)
        answer = denoise(base, first)
        assert torch.equal(answer, denoise(base, second))
        assert torch.equal(answer, denoise(base, copy.deepcopy(first)))
    assert low < float((answer - expected).norm() / expected.norm()) < high
    assert next(first.parameters()).dtype == torch.float32


@pytest.mark.parametrize("scheme", SCHEMES)
def test_looking_does_not_spoil_learning(scheme: Any) -> None:
    """R-10: a forward pass without gradients in eval mode leaves the weights ready for a backward pass."""
    packed = small(nn.Linear(128, 128).eval().requires_grad_(False), scheme)
    before = packed.weight.clone()
    with torch.no_grad():
        packed(torch.randn(3, 128))
    x = torch.randn(3, 128, requires_grad=True)
    packed(x).sum().backward()
    assert torch.equal(packed.weight, before)
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_autocast_decides_the_arithmetic(scheme: Any) -> None:
    """R-11: bf16 under autocast, and the gradient comes back as the input came in."""
    packed = small(nn.Linear(128, 64).requires_grad_(False), scheme)
    x = torch.randn(3, 128, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        answer = packed(x)
    assert answer.dtype == torch.bfloat16
    assert torch.allclose(answer.float(), packed(x), rtol=0.05, atol=0.05)
    answer.float().sum().backward()
    assert x.grad.dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", SCHEMES)
def test_layers_move(scheme: Any) -> None:
    """R-29: a small layer goes to a device and comes back, with all that belongs to it."""
    packed = small(nn.Linear(128, 64).requires_grad_(False), scheme)
    x = torch.randn(3, 128)
    expected = packed(x)
    there = packed.to("cuda")(x.cuda()).cpu()
    assert torch.allclose(there, expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(packed.to("cpu")(x), expected)
