"""The layer computes what PEFT's does, and leaves the base alone."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig

from sdlora.errors import AdapterError
from sdlora.lora.attach import detach, match_targets, mount
from sdlora.lora.kinds import LowRank
from sdlora.lora.layers import Dropout, LoraLayer, StackEntry, lora_layers
from tests.checks import raises
from tests.lora_fixtures import create_adapter


def add_peft(unet, adapter):
    """The same adapter by PEFT, in a copy of the UNet."""
    oracle = copy.deepcopy(unet)
    names = list(adapter.modules)
    oracle.add_adapter(
        LoraConfig(r=adapter.rank, lora_alpha=adapter.alpha, target_modules=names, lora_dropout=0.0)
    )
    modules = dict(oracle.named_modules())
    for name, pair in adapter.modules.items():
        modules[name].lora_A["default"].weight.data.copy_(pair.down.data)
        modules[name].lora_B["default"].weight.data.copy_(pair.up.data)
    return oracle, modules


@pytest.mark.parametrize("targets", [["attention"], ["all"]], ids=["attention", "all"])
def test_peft_is_matched(unet, run, make_adapter, targets):
    """R-01 R-09: outputs and gradients equal PEFT's, for Linear and Conv2d, with alpha != rank."""
    adapter = make_adapter(unet, rank=4, alpha=3.0, targets=targets)
    oracle, modules = add_peft(unet, adapter)
    mount(unet, [(adapter, 1.0)])
    kinds = {type(layer.base) for layer in lora_layers(unet).values()}
    linear, conv = torch.nn.Linear, torch.nn.Conv2d
    assert kinds == ({linear} if targets == ["attention"] else {linear, conv})
    ours, theirs = run(unet), run(oracle)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    ours.square().mean().backward()
    theirs.square().mean().backward()
    for name, pair in adapter.modules.items():
        for tensor, parameter in (
            (pair.down, modules[name].lora_A["default"].weight),
            (pair.up, modules[name].lora_B["default"].weight),
        ):
            scale = float(parameter.grad.abs().max())
            torch.testing.assert_close(tensor.grad, parameter.grad, rtol=1e-3, atol=1e-4 * scale, msg=name)


def test_every_up_gets_a_gradient_and_moves(unet, run):
    """R-09 R-06: from a fresh start each up-matrix gets a gradient and moves; nothing else does."""
    before = copy.deepcopy(unet.state_dict())
    adapter = create_adapter(unet, match_targets(unet, ["all"]), 4, 4, seed=0)
    mount(unet, [(adapter, 1.0)])
    assert all(parameter.dtype == torch.float32 for parameter in adapter.parameters())
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-3)
    run(unet).square().mean().backward()
    for name, pair in adapter.modules.items():
        assert torch.isfinite(pair.up.grad).all(), name
        assert pair.up.grad.abs().max() > 0, name
    optimizer.step()
    assert all(bool(pair.up.detach().any()) for pair in adapter.modules.values())
    detach(unet)
    after = unet.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert all(parameter.grad is None for parameter in unet.parameters())


def test_gradient_checkpointing_changes_no_gradient(make_unet, run, make_adapter):
    """R-09: gradients with and without checkpointing are equal."""
    gradients = []
    for checkpointing in (False, True):
        unet = make_unet()
        adapter = make_adapter(unet)
        mount(unet, [(adapter, 1.0)])
        if checkpointing:
            unet.enable_gradient_checkpointing()
        unet.train()
        assert unet.is_gradient_checkpointing == checkpointing
        run(unet).square().mean().backward()
        gradients.append([tensor.grad for tensor in adapter.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_base(unet, run, make_adapter, dtype):
    """R-06 R-11: on a bf16 or fp16 base the adapter stays fp32, trains, and the output is near fp32's."""
    adapter = make_adapter(unet, targets=["all"])
    mount(unet, [(adapter, 1.0)])
    exact = run(unet).detach()
    unet.to(dtype)
    assert unet.dtype == dtype
    output = run(unet)
    assert output.dtype == dtype
    assert (output.float() - exact).abs().max() < 0.05 * exact.abs().max()
    output.float().square().mean().backward()
    for tensor in adapter.parameters():
        assert tensor.dtype == tensor.grad.dtype == torch.float32
        assert torch.isfinite(tensor.grad).all()


def test_autocast(unet, run, make_adapter):
    """R-11: under autocast to bf16 an fp32 base and adapter give fp32 gradients."""
    adapter = make_adapter(unet)
    mount(unet, [(adapter, 1.0)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = run(unet).float().square().mean()
    loss.backward()
    assert all(tensor.grad.dtype == torch.float32 for tensor in adapter.parameters())


def test_zero_strength_is_the_base(unet, run, make_adapter):
    """R-37 R-38: an empty stack, or strength 0, gives the base's output to the bit."""
    base = run(unet)
    adapter = make_adapter(unet, targets=["all"])
    mount(unet, [(adapter, 0.0)])
    assert torch.equal(run(unet), base)
    mount(unet, [])
    assert torch.equal(run(unet), base)
    mount(unet, [(adapter, 1.0)])
    assert not torch.equal(run(unet), base)


@pytest.mark.parametrize("stride", [1, 2])
def test_convolution_equals_a_changed_weight(stride):
    """R-07: a kernel of 3 with stride and padding is the same as adding `up * down` to the weight."""
    torch.manual_seed(0)
    base = torch.nn.Conv2d(5, 7, 3, stride=stride, padding=1)
    layer = LoraLayer(base)
    down, up, x = torch.randn(2, 5, 3, 3), torch.randn(7, 2, 1, 1), torch.randn(3, 5, 9, 9)
    layer.stack = (StackEntry(LowRank(down, up), 0.5),)
    changed = copy.deepcopy(base)
    changed.weight.data += 0.5 * torch.einsum("or,rihw->oihw", up[:, :, 0, 0], down)
    torch.testing.assert_close(layer(x), changed(x), rtol=1e-4, atol=1e-5)
    assert layer.weight is base.weight
    assert layer.bias is base.bias


def test_adapters_add_up(unet, run, make_adapter):
    """R-37: a stack is the sum: two adapters equal one with both changes in one."""
    one, two = make_adapter(unet, seed=1, alpha=4), make_adapter(unet, seed=2, alpha=4)
    mount(unet, [(one, 0.5), (two, -1.0)])
    stacked = run(unet)
    both = make_adapter(unet, rank=8, alpha=8)
    for name, pair in both.modules.items():
        a, b = one.modules[name], two.modules[name]
        pair.down.data = torch.cat([a.down, b.down]).detach()
        pair.up.data = torch.cat([0.5 * a.up, -b.up], dim=1).detach()
    mount(unet, [(both, 1.0)])
    torch.testing.assert_close(run(unet), stacked, rtol=1e-4, atol=1e-5)


def test_dropout_is_off_outside_of_training(unet, run, make_adapter):
    """R-10: sampling and the held-out loss see the whole adapter; other adapters are never dropped from."""
    adapter, frozen = make_adapter(unet, targets=["all"]), make_adapter(unet, seed=1).to()
    mount(unet, [(adapter, 1.0)])
    expected = run(unet)
    dropout = Dropout(0.5)
    mount(unet, [(adapter, 1.0)], dropout)
    assert torch.equal(run(unet), expected)
    with dropout.drawn([1, 2]):
        dropped = run(unet)
        assert torch.equal(run(unet), dropped)
    with dropout.drawn([1, 3]):
        other = run(unet)
    assert torch.equal(dropped[0], other[0])
    assert not torch.equal(dropped[1], other[1])
    assert not torch.equal(dropped, expected)
    assert torch.equal(run(unet), expected)
    mount(unet, [(frozen, 1.0)], dropout)
    whole = run(unet)
    with dropout.drawn([1, 2]):
        assert torch.equal(run(unet), whole)


def test_dropout_keeps_the_mean():
    """Inverted dropout: a share of the hidden values is zero, the others grow, the mean stays."""
    dropout = Dropout(0.25)
    drop = dropout.of_module("some.module")
    values = torch.ones(2, 4000, 8)
    with dropout.drawn([3, 4]):
        dropped = drop(values)
        assert not torch.equal(dropped, dropout.of_module("another.module")(values))
    assert float((dropped == 0).float().mean()) == pytest.approx(0.25, abs=0.01)
    assert dropped.unique().tolist() == [0, pytest.approx(4 / 3)]
    assert float(dropped.mean()) == pytest.approx(1, abs=0.01)
    assert not torch.equal(dropped[0], dropped[1])
    assert Dropout(0).of_module("some.module") is None


def test_dropout_of_captions_in_parts():
    """R-03: a text encoder sees the parts of a caption one after the other, each dropped from on its own."""
    drop = (dropout := Dropout(0.5)).of_module("some.module")
    values = torch.ones(4, 300)
    with dropout.drawn([3, 4]):
        dropped = drop(values)
    with dropout.drawn([4]):
        assert torch.equal(drop(values[2:]), dropped[2:])
    assert not torch.equal(dropped[0], dropped[1])


def test_dropout_knows_nothing_of_the_batch(make_unet, run, make_adapter):
    """R-03 R-04 R-17: no ambient randomness; checkpointing and smaller batches draw the same."""
    adapter, dropout = make_adapter(make_unet(), targets=["all"]), Dropout(0.3)
    gradients = []
    for checkpointing in (False, True):
        unet = make_unet()
        mount(unet, [(adapter, 1.0)], dropout)
        if checkpointing:
            unet.enable_gradient_checkpointing()
        unet.train()
        before = torch.get_rng_state()
        with dropout.drawn([7, 8]):
            output = run(unet)
            output.square().mean().backward()
        assert torch.equal(torch.get_rng_state(), before)
        gradients.append([tensor.grad.clone() for tensor in adapter.parameters()])
        for tensor in adapter.parameters():
            tensor.grad = None
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed, rtol=1e-5, atol=1e-8)
    layer = LoraLayer(torch.nn.Linear(6, 5))
    x, pair = torch.randn(2, 3, 6), LowRank(torch.randn(4, 6), torch.randn(5, 4))
    layer.stack = (StackEntry(pair, 1.0, dropout.of_module("x")),)
    with dropout.drawn([7, 8]):
        both = layer(x)
    for number, seed in enumerate((7, 8)):
        with dropout.drawn([seed]):
            torch.testing.assert_close(layer(x[number : number + 1])[0], both[number])


@pytest.mark.parametrize("targets", [["attention"], ["all"]], ids=["attention", "all"])
def test_each_sample_of_a_batch_has_its_own_strength(unet, run, make_adapter, targets):
    """R-37: two rows of one batch equal the same rows of two batches; guidance repeats the strengths."""
    adapter = make_adapter(unet, targets=targets).to()
    alone = {}
    for strength in (0.0, 0.5, 1.0):
        mount(unet, [(adapter, strength)])
        alone[strength] = run(unet)
    for first, second in ((1.0, 0.5), (0.0, 1.0)):
        mount(unet, [(adapter, torch.tensor([first, second]))])
        both = run(unet)
        torch.testing.assert_close(both[0], alone[first][0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(both[1], alone[second][1], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(alone[0.5], alone[1.0], atol=1e-4)
    layer = next(iter(lora_layers(unet).values()))
    x = torch.randn(4, 3, layer.weight.shape[1]) if layer.weight.ndim == 2 else torch.randn(4, 32, 4, 4)
    doubled = layer(torch.cat([x[:2], x[:2]]))
    torch.testing.assert_close(doubled[:2], doubled[2:])


def test_strengths_that_do_not_fit_the_batch(unet, run, make_adapter):
    """Three strengths for two samples are a mistake, not a broadcast."""
    mount(unet, [(make_adapter(unet).to(), torch.tensor([1.0, 0.5, 0.2]))])
    with raises(AdapterError, "lora.strengths", shows=("3 strengths", "batch of 2")):
        run(unet)


def test_a_strength_of_samples_is_not_rounded():
    """R-10: in bf16, a strength for each sample gives the bits of the same strength for the batch."""
    generator = torch.Generator().manual_seed(0)
    x, down, up = (torch.randn(shape, generator=generator) for shape in ((2, 5, 8), (4, 8), (6, 4)))
    pair, layer, x = LowRank(down, up), torch.nn.Linear(8, 6), x.bfloat16()
    together = pair.product(x, layer, torch.tensor([0.6, 0.6]), None)
    assert torch.equal(together, pair.product(x, layer, 0.6, None))
