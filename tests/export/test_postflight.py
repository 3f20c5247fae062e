"""Postflight: diffusers loads each file, and what is wrong with it is named (R-01)."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import sdlora.export.postflight
from sdlora import cli
from sdlora.config import BaseSection
from sdlora.errors import AdapterError
from sdlora.export.export import export_adapter
from sdlora.export.postflight import postflight, verify_export
from sdlora.lora.attach import detach, match_targets, mount
from sdlora.lora.layers import lora_layers
from sdlora.models.info import inspect_base
from sdlora.models.load import load_base, load_fresh_pipeline
from sdlora.models.quantize import QuantizedConv2d, QuantizedLinear
from tests.checks import raises
from tests.lora_fixtures import create_adapter, metadata_of


@pytest.mark.parametrize("targets", [["attention"], ["all"]], ids=["attention", "all"])
def test_postflight_passes_for_both_dialects(tmp_path, unet, info, make_adapter, targets):
    """R-01: the trained modules, the trained output and not the base's; alpha != rank."""
    adapter = make_adapter(targets)
    mount(unet, [(adapter, 0.3)])
    stacks = {name: layer.stack for name, layer in lora_layers(unet).items()}
    paths = [
        export_adapter(adapter, tmp_path / f"{dialect}.safetensors", dialect=dialect).path
        for dialect in ("diffusers", "kohya")
    ]
    reports = postflight(paths, adapter, unet, info)
    assert [report.path for report in reports] == paths
    for report in reports:
        assert report.num_modules == len(adapter.modules) == len(match_targets(unet, targets))
        assert report.effect > 1e-3
        assert report.difference < 1e-2 * report.effect
        assert str(len(adapter.modules)) in str(report)
    assert {name: layer.stack for name, layer in lora_layers(unet).items()} == stacks


def test_postflight_leaves_a_plain_unet_plain(tmp_path, unet, info, make_adapter):
    """R-01 R-38: a UNet without adapters is without adapters afterwards; train mode is kept."""
    adapter = make_adapter()
    path = export_adapter(adapter, tmp_path / "x.safetensors").path
    unet.train()
    postflight([path], adapter, unet, info)
    assert unet.training
    assert not lora_layers(unet)
    unet.eval()


@pytest.fixture(scope="module")
def half(info):
    return load_base(info, dtype=torch.bfloat16, device="cpu").denoiser


@pytest.mark.parametrize("size", [1e-6, 0.02])
def test_an_error_shows_in_bf16(tmp_path, half, info, make_adapter, size, monkeypatch):
    """R-01, R-11: an error of a tenth of the effect is not taken for rounding, however small it is."""
    adapter = make_adapter(size=size)
    path = export_adapter(adapter, tmp_path / "x.safetensors").path
    [report] = postflight([path], adapter, half, info)
    assert report.difference < 0.05 * report.effect
    assert half.dtype == torch.bfloat16
    state = {k: v * 1.12 if "lora_B" in k else v for k, v in load_file(path).items()}
    save_file(state, path, metadata_of(path))
    # The outputs alone must show it.
    monkeypatch.setattr(sdlora.export.postflight, "MODULE_TOLERANCE", 1.0)
    with raises(AdapterError, "export.proof", shows="output"):
        postflight([path], adapter, half, info)


@pytest.mark.parametrize(("quantize", "dtype"), [("int8", torch.bfloat16), ("nf4", torch.float32)])
def test_postflight_on_a_quantised_base(tmp_path, sd15_folder, quantize, dtype):
    """R-01, R-48: the file is proven on the base that it was trained on, whose layers are then as before."""
    info = inspect_base(BaseSection(source=str(sd15_folder), quantize=quantize))
    unet = load_base(info, dtype=dtype, device="cpu").denoiser
    adapter = create_adapter(unet, match_targets(unet, ["all"]), 4, 2.0, seed=0, family=info.family)
    generator = torch.Generator().manual_seed(1)
    for pair in adapter.modules.values():
        pair.up.data.normal_(std=0.02, generator=generator)
    before = dict(unet.named_modules())
    assert any(isinstance(module, QuantizedConv2d) for module in before.values())
    assert any(isinstance(module, QuantizedLinear) for module in before.values())
    path = export_adapter(adapter, tmp_path / "x.safetensors").path
    [report] = postflight([path], adapter, unet, info)
    assert report.num_modules == len(adapter.modules)
    assert report.difference < 0.05 * report.effect
    after = dict(unet.named_modules())
    assert before.keys() == after.keys()
    assert all(after[name] is module for name, module in before.items())
    state = {k: v * 1.12 if "lora_B" in k else v for k, v in load_file(path).items()}
    save_file(state, path, metadata_of(path))
    with raises(AdapterError, "export.proof"):
        postflight([path], adapter, unet, info)
    assert all(module is before[name] for name, module in unet.named_modules())


def test_nothing_of_peft_is_left(tmp_path, whole_base):
    """R-01, R-38: the same modules, attributes, modes and random states as before, and the same output."""
    adapter = make_text_adapter(whole_base)
    path = export_adapter(adapter, tmp_path / "x.safetensors").path
    parts = whole_base.components
    mount(parts, [(adapter, 0.5)])
    torch.manual_seed(7)
    expected = whole_base.encode_captions(["a cat"]).hidden, torch.rand(1)
    modules = {name: dict(part.named_modules()) for name, part in parts.items()}
    attributes = {name: set(vars(part)) for name, part in parts.items()}
    torch.manual_seed(7)
    postflight([path], adapter, parts, whole_base.info)
    assert torch.equal(whole_base.encode_captions(["a cat"]).hidden, expected[0])
    assert torch.equal(torch.rand(1), expected[1])
    for name, part in parts.items():
        assert {key: id(m) for key, m in part.named_modules()} == {k: id(m) for k, m in modules[name].items()}
        assert set(vars(part)) == attributes[name]
    detach(parts)


def test_a_fresh_pipeline_agrees(tmp_path, make_adapter):
    """R-01: the same proof with a base that diffusers has loaded."""
    adapter = make_adapter()
    source = export_adapter(adapter, tmp_path / "source.safetensors", precision="fp32").path
    path = export_adapter(adapter, tmp_path / "x.safetensors", dialect="kohya").path
    report = verify_export(source, path, "builtin")
    assert report.num_modules == len(adapter.modules)
    assert report.difference < 1e-2 * report.effect
    state = {k: v * 1.2 if "lora_up" in k else v for k, v in load_file(path).items()}
    save_file(state, path, metadata_of(path))
    with raises(AdapterError, "export.proof"):
        verify_export(source, path, "builtin")


def drop_module(state, metadata):
    return {key: tensor for key, tensor in state.items() if "mid_block" not in key or "attn2.to_v" not in key}


def add_module(state, metadata):
    extra = {
        key.replace("attn1.to_q", "attn1.to_nothing"): state[key].clone()
        for key in state
        if "mid_block" in key
    }
    return {**state, **extra}


def zero_module(state, metadata):
    return {
        key: torch.zeros_like(tensor) if "mid_block" in key and "attn2.to_v.lora_B" in key else tensor
        for key, tensor in state.items()
    }


def change_alpha(state, metadata):
    metadata["lora_adapter_metadata"] = json.dumps(
        {"unet.r": 4, "unet.lora_alpha": 2, "unet.target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}
    )
    return state


def zero_everything(state, metadata):
    return {key: torch.zeros_like(tensor) if "lora_B" in key else tensor for key, tensor in state.items()}


def rename_all(state, metadata):
    return {key.removeprefix("unet."): tensor for key, tensor in state.items()}


def other_widths(state, metadata):
    return {key: tensor[:, :8].contiguous() if "lora_A" in key else tensor for key, tensor in state.items()}


@pytest.mark.parametrize(
    ("damage", "shows"),
    [
        (drop_module, ["missing", "mid_block", "attn2.to_v"]),
        (add_module, ["to_nothing"]),
        (zero_module, ["mid_block", "attn2.to_v"]),
        (change_alpha, ["80 modules", "down_blocks", "75 more"]),
        (zero_everything, ["80 modules", "down_blocks", "the base's"]),
        (rename_all, ["80 trained modules are missing", "the base's"]),
        (other_widths, ["load"]),
    ],
)
def test_postflight_catches_damage(tmp_path, unet, info, make_adapter, damage, shows):
    """R-01: each damaged export is caught, with exit code 1, and the modules are named."""
    adapter = make_adapter()
    path = export_adapter(adapter, tmp_path / "x.safetensors").path
    metadata = metadata_of(path)
    state = damage(load_file(path), metadata)
    save_file(state, path, metadata)
    with raises(AdapterError, "export.proof", shows=str(path)) as caught:
        postflight([path], adapter, unet, info)
    assert caught.value.exit_code == 1
    assert all(name in str(caught.value) for name in shows)
    assert "\n" not in str(caught.value)
    assert not lora_layers(unet)
    postflight([export_adapter(adapter, path).path], adapter, unet, info)


def test_postflight_prints_nothing(tmp_path, unet, info, make_adapter, capfd):
    """R-01: the libraries' chatter is heard, not shown."""
    adapter = make_adapter()
    path = export_adapter(adapter, tmp_path / "x.safetensors", dialect="kohya").path
    postflight([path], adapter, unet, info)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_stock_pipeline_at_strength_zero_and_after_unloading(tmp_path, unet, info, make_adapter):
    """R-37 R-38: strength 0 and unloading give the stock base's output."""
    path = export_adapter(make_adapter(), tmp_path / "x.safetensors").path
    pipeline = load_fresh_pipeline(info, [], torch.float32)
    generator = torch.Generator().manual_seed(0)
    channels, width = info.denoiser_config["in_channels"], info.denoiser_config["cross_attention_dim"]
    latents = torch.randn(1, channels, 8, 8, generator=generator)
    hidden = torch.randn(1, 4, width, generator=generator)

    @torch.no_grad()
    def run():
        return pipeline.unet.eval()(latents, torch.tensor([500]), encoder_hidden_states=hidden).sample

    base = run()
    pipeline.load_lora_weights(str(tmp_path), weight_name=path.name, adapter_name="any_3c")
    assert not torch.equal(run(), base)
    pipeline.set_adapters(["any_3c"], [0.0])
    torch.testing.assert_close(run(), base, rtol=0, atol=1e-6)
    pipeline.unload_lora_weights()
    assert torch.equal(run(), base)


@pytest.fixture(scope="module", params=[pytest.param("builtin", marks=pytest.mark.slow), "sdxl"])
def whole_base(request, sdxl_folder):
    """A base with one text encoder, and one with two."""
    source = "builtin" if request.param == "builtin" else str(sdxl_folder)
    return load_base(inspect_base(BaseSection(source=source)), dtype=torch.float32, device="cpu")


def make_text_adapter(base, targets=("attention", "text_attention", "text_mlp")):
    names = match_targets(base.components, list(targets))
    adapter = create_adapter(base.components, names, 4, 2.0, seed=0, family=base.info.family)
    generator = torch.Generator().manual_seed(1)
    for pair in adapter.modules.values():
        pair.up.data.normal_(std=0.1, generator=generator)
    return adapter


def test_postflight_of_text_encoders(tmp_path, whole_base, capfd):
    """R-01, R-07, R-34: modules and outputs of each text encoder too, in both dialects, and no bars."""
    adapter = make_text_adapter(whole_base)
    assert adapter.components == ["unet", *whole_base.info.traits.text_encoders]
    paths = [
        export_adapter(adapter, tmp_path / f"{dialect}.safetensors", dialect=dialect).path
        for dialect in ("diffusers", "kohya")
    ]
    for report in postflight(paths, adapter, whole_base.components, whole_base.info):
        assert report.num_modules == len(adapter.modules)
        assert report.difference < 1e-2 * report.effect
    assert not lora_layers(whole_base.components)
    alone = make_text_adapter(whole_base, ["text_attention"])
    path = export_adapter(alone, tmp_path / "alone.safetensors").path
    assert postflight([path], alone, whole_base.components, whole_base.info)[0].effect > 0
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("lost", ["text_encoder", "layers.1.mlp.fc1"])
def test_postflight_catches_damage_in_text_encoders(tmp_path, whole_base, lost):
    """R-01, R-34: a file that lost modules of a text encoder is caught, and the modules are named."""
    adapter = make_text_adapter(whole_base)
    path = export_adapter(adapter, tmp_path / "x.safetensors").path
    save_file({k: tensor for k, tensor in load_file(path).items() if lost not in k}, path, metadata_of(path))
    with raises(AdapterError, "export.proof", shows=lost) as caught:
        postflight([path], adapter, whole_base.components, whole_base.info)
    assert caught.value.exit_code == 1
    # A single lost module may stay within a tenth of the effect; it is named all the same.
    assert lost != "text_encoder" or "output" in str(caught.value)


def test_verify_from_the_command_line(tmp_path, make_adapter, capsys, monkeypatch):
    """R-01: `export --verify` proves the file that it writes, against the one that it reads."""
    file = export_adapter(make_adapter(), tmp_path / "x.safetensors").path
    out = tmp_path / "y.safetensors"
    arguments = ["export", str(file), "--format", "kohya", "--out", str(out), "--verify", "--base", "builtin"]
    monkeypatch.setattr(sys, "argv", ["sdlora", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 0
    assert "\nverified  y.safetensors " in capsys.readouterr().out
