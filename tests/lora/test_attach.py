"""Choosing layers, putting adapters on and taking them off."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sdlora.errors import AdapterError, ConfigError
from sdlora.formats.write import fold
from sdlora.lora.attach import count_parameters, detach, match_targets, mount, mounted
from sdlora.lora.layers import carrier_layers, lora_layers
from tests.checks import bounded, raises
from tests.lora_fixtures import create_adapter


def test_numbers_of_modules_of_sd15(sd15):
    """R-07 R-16: attention is 128 modules, 199,296 parameters a rank; the whole transformer 192."""
    attention = match_targets(sd15, ["attention"])
    assert len(attention) == 128
    assert count_parameters(sd15, dict.fromkeys(attention, 1)) == 199_296
    assert count_parameters(sd15, dict.fromkeys(attention, 8)) == 8 * 199_296
    assert len(match_targets(sd15, ["attention+feedforward"])) == 160
    assert len(match_targets(sd15, ["all-linear"])) == 192
    assert len(match_targets(sd15, ["all"])) == 278
    assert len(match_targets(sd15, ["convolutions"])) == 22 * 2 + 14 + 6
    assert sd15.device.type == "meta"


def test_patterns(unet):
    """Targets are presets or patterns, united, in the order of the network."""
    values = match_targets(unet, ["*.attn2.to_v"])
    assert values
    assert all(name.endswith("attn2.to_v") for name in values)
    both = match_targets(unet, ["attention", "*.attn2.to_v"])
    assert both == match_targets(unet, ["attention"])
    assert match_targets(unet, ["conv_in", "time_embedding.linear_[12]"])[0] == "conv_in"
    assert match_targets(unet, ["*"]) == list(carrier_layers(unet))


@pytest.mark.parametrize(
    ("target", "shows"),
    [
        ("atention", ("['atention']", "did you mean attention?")),
        ("to_v", "did you mean '*.to_v'?"),
        ("*norm1", "norm1, no Linear or Conv2d"),
        ("mid_blok.attentions.0.proj_in", "mid_block.attentions.0.proj_in"),
    ],
)
def test_a_target_without_a_match_is_named(unet, target, shows):
    """R-35: a pattern that matches nothing is an error with the nearest name, exit code 2."""
    with raises(ConfigError, "lora.targets", shows=shows) as caught:
        match_targets(unet, [target])
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_hundreds_of_wrong_targets(unet):
    """R-35: no line repeats them all, and nothing looks for what was meant by each."""
    with bounded(), raises(ConfigError, "lora.targets", shows="and more mistakes") as caught:
        match_targets(unet, [f"no-{number}" for number in range(5000)])
    assert len(str(caught.value)) < 40_000


def test_style_only_needs_sdxl(unet, sd15):
    """The block that B-LoRA trains is not in SD 1.x: refused for what it is."""
    for model in (unet, sd15):
        with raises(ConfigError, "lora.targets", shows=("'style-only'", "SDXL", "up_blocks.0")):
            match_targets(model, ["style-only"])


def test_all_wrong_targets_at_once(unet):
    """R-35: one line for each."""
    with raises(ConfigError, "lora.targets") as caught:
        match_targets(unet, ["atention", "attention", "*.nothing"])
    assert len(caught.value.problems) == 2


def test_targets_are_the_same_when_attached(unet, make_adapter):
    """A wrapped network has the same modules as before, by the same names."""
    before = match_targets(unet, ["all"])
    mount(unet, [(make_adapter(unet, targets=["all"]), 1.0)])
    assert match_targets(unet, ["all"]) == before
    assert len(lora_layers(unet)) == len(before)
    assert count_parameters(unet, dict.fromkeys(before, 2)) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_detach_gives_the_base_back(unet, run, make_adapter, dtype):
    """R-38: after 20 switches and a detach, output, modules and keys are those of the base, to the bit."""
    unet.to(dtype)
    base, keys = run(unet), list(unet.state_dict())
    modules = dict(unet.named_modules())
    adapters = [make_adapter(unet, seed=seed, targets=["all"]) for seed in range(2)]
    for switch in range(20):
        mount(unet, [(adapters[switch % 2], 1.0), (adapters[0], -0.3)])
    assert not torch.equal(run(unet), base)
    detach(unet)
    assert torch.equal(run(unet), base)
    assert list(unet.state_dict()) == keys
    assert dict(unet.named_modules()) == modules
    assert not lora_layers(unet)


def test_mount_replaces(unet, run, make_adapter):
    """Mounting is absolute: what was mounted before leaves no trace."""
    small, large = make_adapter(unet, targets=["*.attn2.to_v"]), make_adapter(unet, targets=["all"])
    mount(unet, [(small, 1.0)])
    expected = run(unet)
    mount(unet, [(large, 1.0)])
    mount(unet, [(small, 1.0)])
    assert torch.equal(run(unet), expected)


def test_strength_and_scale_multiply(unet, run, make_adapter):
    """R-37: strength 0.5 of an adapter is the same as half its alpha."""
    adapter = make_adapter(unet, alpha=4)
    mount(unet, [(adapter, 0.5)])
    half = run(unet)
    adapter.alpha = 2
    mount(unet, [(adapter, 1.0)])
    assert torch.equal(run(unet), half)


def test_mounted_puts_everything_back(unet, run, make_adapter):
    """R-10: after sampling, also one that fails, wrapped layers and stacks are as they were."""
    base = run(unet)
    trained, other = make_adapter(unet), make_adapter(unet, targets=["all"], seed=1)
    with mounted(unet, [(other, 1.0)]):
        assert lora_layers(unet)
    assert not lora_layers(unet)
    mount(unet, [(trained, 1.0)])
    expected, layers = run(unet), lora_layers(unet)

    def fail():
        with mounted(unet, [(other, 1.0)]):
            assert not torch.equal(run(unet), expected)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.equal(run(unet), expected)
    assert lora_layers(unet) == layers
    with mounted(unet, []):
        assert torch.equal(run(unet), base)
    assert torch.equal(run(unet), expected)


def test_another_family_does_not_fit(make_unet, make_adapter, run):
    """R-41: other widths are one clear line, and nothing is mounted."""
    unet, wider = make_unet(), make_unet(cross_attention_dim=32)
    adapter = make_adapter(wider)
    adapter.notes["sdlora.base_name"] = "some/base"
    base, good = run(unet), make_adapter(unet)
    with raises(AdapterError, "lora.other-base", shows=("attn2.to_k", "32 to 32", "24 to 32", "some/base")):
        mount(unet, [(good, 1.0), (adapter, 1.0)])
    assert not lora_layers(unet)
    assert torch.equal(run(unet), base)


def test_other_modules_do_not_fit(unet, make_adapter):
    """R-41: modules that are not there are counted and named."""
    adapter = make_adapter(unet)
    adapter.modules = {
        name.replace("down_blocks.0", "down_blocks.7"): pair for name, pair in adapter.modules.items()
    }
    with raises(AdapterError, "lora.other-base", shows=("8 of its 32 modules", "down_blocks.7")):
        mount(unet, [(adapter, 1.0)])


def test_text_encoder_modules_are_not_dropped_silently(unet, components, make_adapter):
    """R-34: an adapter for text encoders is refused where it could only be half used; nothing is mounted."""
    adapter = make_adapter(components, targets=["attention", "text_mlp"])
    with raises(AdapterError, "lora.components", shows="4 modules of text_encoder, but only the unet"):
        mount(unet, [(adapter, 1.0)])
    del components["text_encoder_2"]
    with raises(AdapterError, "lora.components", shows="4 modules of text_encoder_2, but"):
        mount(components, [(adapter, 1.0)])
    assert not lora_layers(components)


TEXT_NAMES = [
    f"{component}.text_model.encoder.layers.{layer}.{part}"
    for component in ("text_encoder", "text_encoder_2")
    for layer in (0, 1)
    for part in (*(f"self_attn.{name}_proj" for name in ("k", "v", "q", "out")), "mlp.fc1", "mlp.fc2")
]


def test_text_encoders_have_their_names(components):
    """R-34: both classes of text encoder give the names that files have; presets find their layers."""
    text = match_targets(components, ["text_attention", "text_mlp"])
    assert text == TEXT_NAMES
    assert match_targets(components, ["attention"]) == match_targets(components["unet"], ["attention"])
    assert match_targets(components, ["text_encoder_2.*.q_proj"]) == TEXT_NAMES[14::6]
    assert "text_encoder_2.text_projection" in carrier_layers(components)
    with raises(ConfigError, "lora.targets", shows=("'text_mlp'", "lora.text_encoder")):
        match_targets(components["unet"], ["text_mlp"])


def test_mounting_on_components(components, make_adapter):
    """R-34 R-38: UNet and text encoders carry one adapter together, and give the base back to the bit."""

    def answers():
        tokens = torch.tensor([[1, 5, 6, 2]])
        return [
            components["text_encoder"](tokens).last_hidden_state,
            components["text_encoder_2"](tokens).text_embeds,
        ]

    base, before = answers(), {name: dict(model.named_modules()) for name, model in components.items()}
    adapter = make_adapter(components, targets=["attention", "text_attention", "text_mlp"])
    with mounted(components, [(adapter, 1.0)]):
        assert list(lora_layers(components)) == list(adapter.modules)
        changed = answers()
        sum(output.square().sum() for output in changed).backward()
    assert not any(torch.equal(one, two) for one, two in zip(base, changed, strict=True))
    assert all(adapter.modules[name].up.grad.abs().max() > 0 for name in TEXT_NAMES if "layers.0" in name)
    assert all(torch.equal(one, two) for one, two in zip(base, answers(), strict=True))
    assert {name: dict(model.named_modules()) for name, model in components.items()} == before


def test_a_mounted_network_is_saved_as_its_base(components, make_adapter, tmp_path):
    """R-38: what other libraries save and load is the plain base; a copy carries what it carries."""
    plain = {part: copy.deepcopy(network).state_dict() for part, network in components.items()}
    mount(components, [(make_adapter(components, targets=["all", "text_attention"]), 1.0)])
    for part, network in components.items():
        assert lora_layers({part: network})
        assert network.state_dict().keys() == plain[part].keys()
        network.save_pretrained(tmp_path / part)
        loaded, report = type(network).from_pretrained(tmp_path / part, output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        again = copy.deepcopy(network)
        for parameter in again.parameters():
            parameter.data.zero_()
        again.load_state_dict(plain[part])
        assert lora_layers({part: again}).keys() == lora_layers({part: network}).keys()
        for name, tensor in plain[part].items():
            assert torch.equal(loaded.state_dict()[name], tensor)
            assert torch.equal(again.state_dict()[name], tensor)


def test_a_module_may_have_its_own_scale(unet, run, make_adapter):
    """R-33: `scales` is a factor for each module, in the network as in the folded adapter."""
    adapter = make_adapter(unet, alpha=2)
    names = list(adapter.modules)
    adapter.scales = {names[0]: 3.0, names[1]: 0.25}
    assert [adapter.scale_of(name) for name in names[:3]] == [3, 0.25, 0.5]
    mount(unet, [(adapter, 1.0)])
    trained = run(unet)
    by_hand = adapter.to()
    for name, pair in by_hand.modules.items():
        pair.up *= {names[0]: 3.0, names[1]: 0.25}.get(name, 0.5)
    by_hand.alpha, by_hand.scales = 4.0, {}
    mount(unet, [(by_hand, 1.0)])
    torch.testing.assert_close(run(unet), trained, rtol=1e-5, atol=1e-6)
    folded = fold(adapter)
    assert (folded.scales, folded.alpha) == ({}, 4.0)
    assert all(torch.equal(folded.modules[name].up, pair.up) for name, pair in by_hand.modules.items())


def test_any_network():
    """The column knows nothing of UNets: it works on any module with Linear and Conv2d layers."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2), nn.Conv2d(4, 4, 1, groups=2))
    assert list(carrier_layers(network)) == ["0", "2"]
    before = copy.deepcopy(network)
    mount(network, [(create_adapter(network, ["0", "2"], 2, 2, seed=0), 1.0)])
    x = torch.randn(1, 3, 3, 3)
    assert torch.equal(network[:3](x), before[:3](x))
