"""DoRA against PEFT's own layers, LyCORIS' formula and a changed weight."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sdlora.errors import AdapterError
from sdlora.formats.files import inspect_adapter, load_adapter, save_adapter
from sdlora.formats.write import adapter_to_diffusers, adapter_to_kohya, fold, round_adapter
from sdlora.lora.adapter import Adapter, draw_adapter
from sdlora.lora.attach import match_targets, mount, mounted
from sdlora.lora.dora import Dora
from sdlora.lora.kinds import LowRank
from sdlora.lora.layers import LoraLayer, StackEntry
from tests.checks import raises

STRENGTHS = (0.0, 0.5, 1.0, -0.7)
LAYERS = {
    "linear": (lambda: torch.nn.Linear(12, 20), (3, 5, 12)),
    "linear without bias": (lambda: torch.nn.Linear(12, 20, bias=False), (3, 12)),
    "convolution": (lambda: torch.nn.Conv2d(6, 10, 3, stride=2, padding=1), (2, 6, 9, 9)),
}


@pytest.fixture(params=LAYERS)
def layer(request):
    torch.manual_seed(0)
    make, shape = LAYERS[request.param]
    return make().requires_grad_(False), torch.randn(shape)


def trained(layer, rank=4, seed=1):
    """A module whose magnitudes and directions have moved."""
    generator = torch.Generator().manual_seed(seed)
    drawn = Dora.draw(layer, rank, lambda shape: torch.randn(shape, generator=generator) / 2)
    up = torch.randn(drawn.up.shape, generator=generator) / 2
    moved = drawn.magnitude * (1 + torch.rand(drawn.magnitude.shape, generator=generator) / 2)
    return Dora(drawn.down, up, moved)


def peft_layer(layer, modules, alpha):
    """PEFT's layer with our tensors, an adapter for each module, all active."""
    holder = torch.nn.ModuleDict({"x": copy.deepcopy(layer)})
    for number, module in enumerate(modules):
        config = LoraConfig(
            r=module.rank, lora_alpha=alpha, target_modules=["x"], use_dora=isinstance(module, Dora)
        )
        holder = inject_adapter_in_model(config, holder, f"a{number}")
        oracle = holder["x"]
        oracle.lora_A[f"a{number}"].weight.data.copy_(module.down)
        oracle.lora_B[f"a{number}"].weight.data.copy_(module.up)
        if isinstance(module, Dora):
            weight = oracle.lora_magnitude_vector[f"a{number}"].weight
            weight.data.copy_(module.magnitude.reshape(weight.shape))
    holder["x"].set_adapter([f"a{number}" for number in range(len(modules))])
    return holder["x"].eval()


def effect(layer, module, scale, x):
    carrier = LoraLayer(layer)
    carrier.stack = (StackEntry(module, scale),)
    return carrier(x)


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peft_is_matched_at_every_strength(layer, strength, dtype):
    """R-01 R-37: as PEFT's DoRA layers; in bf16 PEFT rounds the norms of the weight, and we do not."""
    base, x = layer[0].to(dtype), layer[1].to(dtype)
    module = trained(base.float())
    base = base.to(dtype)
    oracle = peft_layer(base, [module], alpha=3)
    oracle.set_scale("a0", strength)
    theirs, ours = oracle(x).float(), effect(base, module, strength * 3 / 4, x).float()
    assert effect(base, module, 0.75, x).dtype == dtype
    size = float(theirs.abs().max())
    error = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(ours, theirs, rtol=0, atol=error * size)
    if strength == 0:
        assert not torch.allclose(ours, base(x).float(), rtol=0, atol=error * size)


def test_gradients_are_peft_s(layer):
    """R-09: the norm is a constant to the gradient of both factors and of the magnitudes."""
    base, x = layer
    module = trained(base).map(torch.nn.Parameter)
    oracle = peft_layer(base, [module], alpha=3)
    oracle(x).square().mean().backward()
    effect(base, module, 0.75, x).square().mean().backward()
    theirs = (
        oracle.lora_A["a0"].weight,
        oracle.lora_B["a0"].weight,
        oracle.lora_magnitude_vector["a0"].weight,
    )
    for ours, other in zip(module.tensors().values(), theirs, strict=True):
        torch.testing.assert_close(ours.grad.flatten(), other.grad.flatten(), rtol=1e-4, atol=1e-6)


def test_a_stack_is_peft_s_with_the_same_adapters_active(layer):
    """R-37: in the order of the stack, a DoRA scales what lies below it, and not what lies above."""
    base, x = layer
    pair = LowRank(trained(base, seed=3).down, trained(base, seed=3).up)
    for modules in ([pair, trained(base)], [trained(base), pair], [trained(base), trained(base, seed=5)]):
        oracle, carrier = peft_layer(base, modules, alpha=2), LoraLayer(base)
        for number, strength in enumerate((0.5, 0.8)):
            oracle.set_scale(f"a{number}", strength)
        carrier.stack = tuple(
            StackEntry(module, s * 2 / 4) for module, s in zip(modules, (0.5, 0.8), strict=True)
        )
        torch.testing.assert_close(carrier(x), oracle(x), rtol=1e-4, atol=1e-5)


def test_it_equals_a_changed_weight(layer):
    """R-38: what `merge-into-base` adds to the weight, alone and on top of another adapter."""
    base, x = layer
    columns = trained(base)
    inputs = base.weight.transpose(0, 1).flatten(1).norm(dim=1)
    columns = Dora(columns.down, columns.up, (inputs * 1.3).reshape(1, -1))
    for modules in ([trained(base)], [columns], [trained(base, seed=3), trained(base)]):
        carrier, changed = LoraLayer(base), copy.deepcopy(base)
        carrier.stack = tuple(StackEntry(module, 0.5) for module in modules)
        total = base.weight.double()
        for module in modules:
            total = total + module.delta_weight(base.weight.double(), 0.5, total)
        changed.weight.data.copy_(total)
        torch.testing.assert_close(carrier(x), changed(x), rtol=1e-4, atol=1e-5)


def test_a_fresh_one_changes_nothing(layer):
    """R-09 R-33: magnitudes start at the norms of the weight, in the dtype of the adapter."""
    for dtype in (torch.float32, torch.bfloat16):
        base, x = layer[0].to(dtype), layer[1].to(dtype)
        fresh = Dora.draw(base, 4, torch.randn)
        assert fresh.magnitude.dtype == torch.float32
        torch.testing.assert_close(effect(base, fresh, 1.0, x), base(x), rtol=1e-6, atol=1e-6)


def test_samples_have_their_own_strengths(layer):
    """R-37: a batch with two strengths is the two batches; guidance repeats them."""
    base, x = layer[0], layer[1][:2]
    module = trained(base)
    both = effect(base, module, torch.tensor([0.5, 1.0]), torch.cat([x, x]))
    for number, scale in enumerate((0.5, 1.0)):
        alone = effect(base, module, scale, x)[number]
        torch.testing.assert_close(both[number], alone)
        torch.testing.assert_close(both[number + 2], alone)


def lycoris_weight(weight, down, up, dora_scale):
    """`apply_weight_decompose` of LyCORIS 3, by hand: of rows or columns, as the shape says."""
    changed = weight + (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    if dora_scale.shape[0] == weight.shape[0]:
        norm = changed.flatten(1).norm(dim=1).reshape(-1, *[1] * (weight.ndim - 1))
    else:
        norm = changed.transpose(0, 1).flatten(1).norm(dim=1).reshape(1, -1, *[1] * (weight.ndim - 2))
    return changed * dora_scale / norm


@pytest.mark.parametrize("axis", ["outputs", "inputs"])
def test_dora_scale_is_that_of_lycoris(layer, axis):
    """R-07: the weight of LyCORIS' formula at strength 1, whatever alpha the file has."""
    base, x = layer
    module, ones = trained(base), [1] * (base.weight.ndim - 2)
    if axis == "inputs":
        norm = base.weight.transpose(0, 1).flatten(1).norm(dim=1)
        dora_scale = (norm * 1.2).reshape(1, -1, *ones)
    else:
        dora_scale = module.magnitude.reshape(-1, 1, *ones)
    read = Dora.from_file({"down": module.down, "up": module.up, "dora_scale": dora_scale}).fold(0.5)
    changed = copy.deepcopy(base)
    changed.weight.data.copy_(lycoris_weight(base.weight, module.down, 0.5 * module.up, dora_scale))
    torch.testing.assert_close(effect(base, read, 1.0, x), changed(x), rtol=1e-4, atol=1e-5)
    assert torch.equal(read.to_file("kohya")["magnitude"], dora_scale)
    if axis == "inputs":
        with raises(AdapterError, "export.formats"):
            read.to_file("diffusers")


@pytest.fixture
def dora(unet):
    """A whole trained DoRA, alpha != rank."""
    names = match_targets(unet, ["all"])
    adapter = draw_adapter(unet, dict.fromkeys(names, 4), dict.fromkeys(names, 0.5), seed=0, kind="dora").to()
    generator = torch.Generator().manual_seed(2)
    for module in adapter.modules.values():
        module.up.copy_(torch.randn(module.up.shape, generator=generator) / 20)
        module.magnitude.mul_(1 + torch.rand(module.magnitude.shape, generator=generator) / 10)
    return adapter


def test_a_file_of_either_dialect_gives_it_back(unet, dora, run, tmp_path):
    """R-02 R-07 R-36: the scale is folded into `up`; factors are rounded, magnitudes stay fp32."""
    rounded, report = round_adapter(dora, "fp16")
    assert report.used == "fp16"
    mount(unet, [(rounded, 1.0)])
    expected = run(unet)
    for dialect in ("diffusers", "kohya"):
        file = save_adapter(tmp_path / f"{dialect}.safetensors", rounded, dialect=dialect)
        read = load_adapter(file)
        assert inspect_adapter(file).kinds == {"dora": len(read.modules)}
        assert read.modules.keys() == dora.modules.keys()
        for name, module in read.modules.items():
            assert torch.equal(module.magnitude, dora.modules[name].magnitude)
        with mounted(unet, [(read, 1.0)]):
            assert torch.equal(run(unet), expected)
        notes = safe_open(file, "pt").metadata()
        assert notes["ss_network_module"] == "lycoris.kohya"
        assert json.loads(notes["ss_network_args"])["dora_wd"] == "True"
    with mounted(unet, [(fold(dora), 1.0)]):
        torch.testing.assert_close(run(unet), expected, rtol=1e-2, atol=1e-3)


def test_keys_of_both_dialects_are_pinned(dora):
    """R-07: golden names and shapes, of a projection and of a convolution."""
    names = ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "down_blocks.0.resnets.0.conv1")
    small = Adapter({name: dora.modules[name] for name in names}, 4, 4.0, "sd1")
    stock = {key: tuple(tensor.shape) for key, tensor in adapter_to_diffusers(small).items()}
    assert stock == {
        f"unet.{names[0]}.lora_A.weight": (4, 32),
        f"unet.{names[0]}.lora_B.weight": (32, 4),
        f"unet.{names[0]}.lora_magnitude_vector": (32,),
        f"unet.{names[1]}.lora_A.weight": (4, 32, 3, 3),
        f"unet.{names[1]}.lora_B.weight": (32, 4, 1, 1),
        f"unet.{names[1]}.lora_magnitude_vector": (1, 32, 1, 1),
    }
    kohya = {key: tuple(tensor.shape) for key, tensor in adapter_to_kohya(small).items()}
    query, convolution = (f"lora_unet_{name.replace('.', '_')}" for name in names)
    assert kohya == {
        f"{query}.alpha": (),
        f"{query}.lora_down.weight": (4, 32),
        f"{query}.lora_up.weight": (32, 4),
        f"{query}.dora_scale": (32, 1),
        f"{convolution}.alpha": (),
        f"{convolution}.lora_down.weight": (4, 32, 3, 3),
        f"{convolution}.lora_up.weight": (32, 4, 1, 1),
        f"{convolution}.dora_scale": (32, 1, 1, 1),
    }


def test_files_that_mix_kinds_are_read(dora, tmp_path):
    """R-40: modules without a magnitude are LoRA's, and the file says how many there are of each."""
    state = adapter_to_kohya(dora)
    plain = [key for key in state if "attn1" in key and key.endswith("dora_scale")]
    for key in plain:
        del state[key]
    save_file(state, tmp_path / "mixed.safetensors")
    read = load_adapter(tmp_path / "mixed.safetensors")
    info = inspect_adapter(tmp_path / "mixed.safetensors")
    assert info.kinds == {"dora": len(dora.modules) - len(plain), "lora": len(plain)}
    assert sum(isinstance(module, Dora) for module in read.modules.values()) == info.kinds["dora"]
    assert any("lora (" in line for line in info.lines())
    save_adapter(tmp_path / "again.safetensors", read, dialect="kohya")
    again = load_file(tmp_path / "again.safetensors")
    assert again.keys() == state.keys()


def test_magnitudes_that_do_not_fit_are_refused(dora):
    """R-25: neither rows nor columns."""
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = dora.modules[name].to_file("kohya")
    for shape in ((31, 1), (32,), (1, 1)):
        parts = {"down": tensors["down"], "up": tensors["up"], "dora_scale": torch.ones(shape)}
        assert Dora.from_file(parts) is None
