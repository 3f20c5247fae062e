"""The fused operation computes what PEFT's layer does, at least as exactly."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from sdlora.lora.attach import mount
from sdlora.lora.layers import Pair, fused_linear, lora_layers


class Case:
    """A layer with a stack of pairs whose products are `size` of its output, and an upstream gradient."""

    def __init__(self, tokens, inputs, outputs, ranks=(16,), size=1.0, dtype=torch.float32):
        generator = torch.Generator().manual_seed(0)

        def draw(*shape):
            return torch.randn(shape, generator=generator)

        self.x, self.upstream = draw(1, tokens, inputs).to(dtype), draw(1, tokens, outputs).to(dtype)
        self.weight, self.bias = (draw(outputs, inputs) / inputs**0.5).to(dtype), draw(outputs).to(dtype)
        self.pairs = [
            Pair(draw(rank, inputs) / inputs**0.5, draw(outputs, rank) * size / rank**0.5, 0.5)
            for rank in ranks
        ]

    def results(self, compute, pairs=None):
        """Output, and gradients of x and the factors of the last pair, in float64."""
        *below, top = self.pairs
        top = Pair(top.down.clone().requires_grad_(), top.up.clone().requires_grad_(), top.scale)
        x = self.x.clone().requires_grad_()
        y = compute(x, [*below, top])
        y.backward(self.upstream.to(y.dtype))
        return [part.double() for part in (y.detach(), x.grad, top.down.grad, top.up.grad)]

    def ours(self):
        return self.results(lambda x, pairs: fused_linear(x, self.weight, self.bias, pairs))

    def exact(self):
        def compute(x, pairs):
            x, weight, bias = x.double(), self.weight.double(), self.bias.double()
            y = x @ weight.T + bias
            for down, up, scale in pairs:
                y = y + scale * (x @ down.double().T) @ up.double().T
            return y

        return self.results(compute)

    def peft(self):
        """A PEFT layer with an adapter for each pair, under autocast, as diffusers' script trains."""
        model = nn.Sequential(nn.Linear(*reversed(self.weight.shape)))
        model[0].weight.data, model[0].bias.data = self.weight, self.bias
        for number, pair in enumerate(self.pairs):
            config = LoraConfig(
                r=len(pair.down), lora_alpha=pair.scale * len(pair.down), target_modules=["0"]
            )
            model = inject_adapter_in_model(config, model, adapter_name=str(number))
            model[0].lora_A[str(number)].weight.data = pair.down.clone()
            model[0].lora_B[str(number)].weight.data = pair.up.clone()
        model[0].set_adapter([str(number) for number in range(len(self.pairs))])
        x, dtype = self.x.clone().requires_grad_(), self.x.dtype
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != torch.float32):
            y = model(x)
        y.backward(self.upstream.to(y.dtype))
        factors = (model[0].lora_A[str(number)].weight.grad, model[0].lora_B[str(number)].weight.grad)
        return [part.double() for part in (y.detach(), x.grad, *factors)]


def errors(results, truth):
    return [float((one - right).norm() / right.norm()) for one, right in zip(results, truth, strict=True)]


@pytest.mark.parametrize("sizes", [(1024, 96, 160), (77, 160, 96)], ids=str)
@pytest.mark.parametrize("ranks", [(16,), (4, 8, 16)], ids=["alone", "on a stack"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_errors_are_at_most_those_of_peft(sizes, ranks, dtype):
    """R-09: outputs and gradients against float64: in bf16 at most 1.1 times PEFT's error, in fp32 1e-5."""
    case = Case(*sizes, ranks=ranks, dtype=dtype)
    truth = case.exact()
    limits = [1e-5] * 4 if dtype == torch.float32 else [1.1 * error for error in errors(case.peft(), truth)]
    for error, limit in zip(errors(case.ours(), truth), limits, strict=True):
        assert error <= limit


def test_a_small_delta_moves_the_output_as_in_peft():
    """R-09: in bf16, a change of a thousandth of the output is rounded away no more than in PEFT's layer."""
    case = Case(1024, 96, 160, size=2e-3, dtype=torch.bfloat16)
    none = nn.functional.linear(case.x, case.weight, case.bias).double()
    exact = case.exact()[0] - (case.x.double() @ case.weight.double().T + case.bias.double())

    def slope(y):
        return float(((y - none) * exact).sum() / exact.square().sum())

    assert slope(case.ours()[0]) >= 0.98 * slope(case.peft()[0])


def test_checkpointing_and_compilation_change_nothing():
    """R-09: under gradient checkpointing to the bit, and through torch.compile."""
    case = Case(64, 32, 48)
    plain = case.ours()
    again = case.results(
        lambda x, pairs: checkpoint(
            lambda x, *factors: fused_linear(x, case.weight, case.bias, [Pair(*factors, 0.5)]),
            x,
            *pairs[0][:2],
            use_reentrant=False,
        )
    )
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))
    compiled = torch.compile(fused_linear, backend="aot_eager", fullgraph=True)
    traced = case.results(lambda x, pairs: compiled(x, case.weight, case.bias, pairs))
    assert max(errors(traced, plain)) <= 1e-6


def test_layers_fuse_only_what_they_can(unet, run, make_adapter):
    """R-09: convolutions, and strengths of each sample, are computed as before."""
    adapter = make_adapter(unet, rank=4, alpha=3.0, targets=["all"])
    for strength in (0.7, torch.tensor([0.7, 0.7])):
        outputs = []
        for is_fused in (False, True):
            mount(unet, [(adapter, strength)])
            for layer in lora_layers(unet).values():
                layer.is_fused = is_fused
            outputs.append(run(unet))
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
