"""Adapters as tensors: dialects, folding, rounding."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdlora.errors import AdapterError
from sdlora.formats.files import load_adapter, save_adapter
from sdlora.formats.read import state_to_adapter
from sdlora.formats.write import (
    adapter_to_diffusers,
    adapter_to_kohya,
    fold,
    relative_error,
    round_adapter,
)
from sdlora.lora.adapter import Adapter
from sdlora.lora.attach import match_targets
from sdlora.lora.kinds import LowRank
from tests.checks import raises
from tests.lora_fixtures import create_adapter


def golden_modules():
    """Every adapted module of SD 1.5 in kohya's spelling, by the paper's plan and not by our code."""
    down = [f"down_blocks_{block}_attentions_{layer}" for block, layer in product((0, 1, 2), (0, 1))]
    up = [f"up_blocks_{block}_attentions_{layer}" for block, layer in product((1, 2, 3), (0, 1, 2))]
    transformers = [*down, "mid_block_attentions_0", *up]
    inside = [
        f"{attention}_{part}"
        for attention, part in product(("attn1", "attn2"), ("to_q", "to_k", "to_v", "to_out_0"))
    ]
    modules = {
        "attention": [
            f"{block}_transformer_blocks_0_{name}" for block, name in product(transformers, inside)
        ],
        "feed_forward": [
            f"{block}_transformer_blocks_0_ff_net_{name}"
            for block, name in product(transformers, ("0_proj", "2"))
        ],
        "projections": [f"{block}_{name}" for block, name in product(transformers, ("proj_in", "proj_out"))],
    }
    resnets = [f"down_blocks_{block}_resnets_{layer}" for block, layer in product(range(4), range(2))]
    resnets += [f"mid_block_resnets_{layer}" for layer in range(2)]
    resnets += [f"up_blocks_{block}_resnets_{layer}" for block, layer in product(range(4), range(3))]
    # The number of channels changes on the way down, and with each skip connection on the way up.
    shortcuts = [
        "down_blocks_1_resnets_0",
        "down_blocks_2_resnets_0",
        *(name for name in resnets if "up" in name),
    ]
    modules["convolutions"] = [f"{name}_{conv}" for name, conv in product(resnets, ("conv1", "conv2"))]
    modules["convolutions"] += [f"{name}_conv_shortcut" for name in shortcuts]
    modules["convolutions"] += [f"down_blocks_{block}_downsamplers_0_conv" for block in range(3)]
    modules["convolutions"] += [f"up_blocks_{block}_upsamplers_0_conv" for block in range(3)]
    modules["time"] = [f"{name}_time_emb_proj" for name in resnets]
    return modules


SETS = {
    "attention": ["attention"],
    "attention+feedforward": ["attention", "feed_forward"],
    "all-linear": ["attention", "feed_forward", "projections"],
    "convolutions": ["convolutions"],
    "all": ["attention", "feed_forward", "projections", "convolutions", "time"],
}


@pytest.mark.parametrize(("target", "num_modules"), zip(SETS, (128, 160, 192, 64, 278), strict=True))
def test_kohya_keys_of_sd15_are_the_golden_list(sd15, target, num_modules):
    """R-07: three keys a module, no more, no less."""
    golden = [name for kind in SETS[target] for name in golden_modules()[kind]]
    assert len(golden) == len(set(golden)) == num_modules
    adapter = create_adapter(sd15, match_targets(sd15, [target]), 1, 1, seed=0, family="sd1")
    assert set(adapter_to_kohya(adapter)) == {
        f"lora_unet_{name}.{part}"
        for name, part in product(golden, ("lora_down.weight", "lora_up.weight", "alpha"))
    }


def test_diffusers_keys_of_sd15(sd15):
    """R-07: two keys a module, `unet.` once in front."""
    adapter = create_adapter(sd15, match_targets(sd15, ["attention"]), 2, 2, seed=0)
    keys = set(adapter_to_diffusers(adapter))
    assert len(keys) == 256
    assert "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0.lora_A.weight" in keys
    assert all(key.startswith("unet.") and key.count("unet.") == 1 for key in keys)
    assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in keys)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "base_model.model.", "unet.", "module._orig_mod."]
)
def test_forbidden_prefixes_cannot_occur(unet, make_adapter, prefix):
    """R-07: names from a wrapped network are written clean, in both dialects."""
    adapter = make_adapter(unet)
    expected = set(adapter_to_diffusers(adapter)), set(adapter_to_kohya(adapter))
    adapter.modules = {prefix + name: pair for name, pair in adapter.modules.items()}
    assert (set(adapter_to_diffusers(adapter)), set(adapter_to_kohya(adapter))) == expected


@pytest.mark.parametrize(
    "name", ["mid_block.attentions.0.proj_in.default", "mid_block.unet.proj_in", "x.lora_A"]
)
def test_names_that_no_file_has_are_refused(name):
    """R-07: what cannot be cleaned is an error."""
    adapter = Adapter({name: LowRank(torch.ones(1, 2), torch.ones(2, 1))}, 1, 1.0)
    with raises(AdapterError, "lora.module-name"):
        adapter_to_diffusers(adapter)


@pytest.mark.parametrize("targets", [["attention"], ["all"]], ids=["attention", "all"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_round_trip_is_bit_exact(tmp_path, unet, make_adapter, targets, precision):
    """R-07: adapter → diffusers → kohya → diffusers loses nothing, tensors and file bytes alike."""
    adapter, rounding = round_adapter(make_adapter(unet, rank=4, alpha=3, targets=targets), precision)
    assert rounding.used == precision
    first = save_adapter(tmp_path / "1.safetensors", adapter)
    kohya = save_adapter(
        tmp_path / "2.safetensors", round_adapter(load_adapter(first), precision)[0], dialect="kohya"
    )
    again = save_adapter(tmp_path / "3.safetensors", round_adapter(load_adapter(kohya), precision)[0])
    one, two = load_file(first), load_file(again)
    assert set(one) == set(two)
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert first.read_bytes() == again.read_bytes()
    assert set(load_file(kohya)) == {
        f"{key}.{part}"
        for key in {key.split(".")[0] for key in load_file(kohya)}
        for part in ("lora_down.weight", "lora_up.weight", "alpha")
    }


def test_mixed_ranks_round_trip(tmp_path, mixed_adapter):
    """R-07: the kohya file is zero-padded to one rank, and reads back with the true ranks."""
    kohya = save_adapter(tmp_path / "kohya.safetensors", mixed_adapter, dialect="kohya")
    state = load_file(kohya)
    assert {tensor.shape[0] for key, tensor in state.items() if key.endswith("down.weight")} == {6}
    assert {float(tensor) for key, tensor in state.items() if key.endswith("alpha")} == {6.0}
    again = load_adapter(kohya)
    assert {pair.rank for pair in again.modules.values()} == {2, 3, 6}
    for name, pair in mixed_adapter.modules.items():
        assert torch.equal(again.modules[name].down, pair.down)
        assert torch.equal(again.modules[name].up, pair.up)


@pytest.mark.parametrize(("rank", "alpha"), [(4, 4.0), (4, 1.0), (4, 6.5), (3, 7.0), (8, 16.0)])
def test_exports_are_scale_folded(unet, make_adapter, deltas, rank, alpha):
    """R-02: a loader that ignores alpha and one that honours it get the trained change, to 1e-6."""
    adapter = make_adapter(unet, rank=rank, alpha=alpha)
    exact = deltas(adapter)
    diffusers, kohya = adapter_to_diffusers(adapter), adapter_to_kohya(adapter)
    for name, delta in exact.items():
        key = "lora_unet_" + name.replace(".", "_")
        down, up = kohya[f"{key}.lora_down.weight"].double(), kohya[f"{key}.lora_up.weight"].double()
        assert float(kohya[f"{key}.alpha"]) == down.shape[0] == rank
        ignoring = up @ down
        honouring = ignoring * float(kohya[f"{key}.alpha"]) / down.shape[0]
        other = (
            diffusers[f"unet.{name}.lora_B.weight"].double()
            @ diffusers[f"unet.{name}.lora_A.weight"].double()
        )
        for change in (ignoring, honouring, other):
            assert (change - delta).abs().max() < 1e-6 * max(1, float(delta.abs().max()))
    assert fold(adapter).alpha == rank


def test_folding_twice_is_folding_once(unet, make_adapter):
    """R-02: what is folded already stays as it is."""
    adapter = make_adapter(unet, alpha=4)
    assert fold(adapter) is adapter
    folded = fold(make_adapter(unet, alpha=3))
    assert fold(folded) is folded
    assert folded.notes["sdlora.trained_alpha"] == "3"


@pytest.mark.parametrize("alpha", [1.0, 8.0, None])
def test_reading_kohya_folds_its_alpha(unet, make_adapter, deltas, alpha):
    """R-02: files of other trainers with alpha != rank, or without any, keep their strength."""
    adapter = make_adapter(unet, rank=4, alpha=4)
    exact = deltas(adapter)
    state = adapter_to_kohya(adapter)
    for key in list(state):
        if key.endswith(".alpha"):
            del state[key]
            if alpha is not None:
                state[key] = torch.tensor(alpha)
    read = state_to_adapter(state)
    assert read.alpha == read.rank == 4
    factor = 1 if alpha is None else alpha / 4
    for name, delta in deltas(read).items():
        torch.testing.assert_close(delta, exact[name] * factor)


def test_reading_kohya_with_an_alpha_for_each_module(unet, make_adapter, deltas):
    """R-02: alphas that differ from module to module are each folded."""
    adapter = make_adapter(unet, rank=4, alpha=4)
    exact, state = deltas(adapter), adapter_to_kohya(adapter)
    factors = {}
    for number, name in enumerate(exact):
        factors[name] = (number % 5 + 1) / 4
        state["lora_unet_" + name.replace(".", "_") + ".alpha"] = torch.tensor(float(number % 5 + 1))
    for name, delta in deltas(state_to_adapter(state)).items():
        torch.testing.assert_close(delta, exact[name] * factors[name])


def test_reading_plain_peft(tmp_path, unet, make_adapter, deltas):
    """R-07: a folder of PEFT, `base_model.model.` keys with alpha in adapter_config.json."""
    adapter = make_adapter(unet, rank=4, alpha=4)
    state = {}
    for name, pair in adapter.modules.items():
        state[f"base_model.model.{name}.lora_A.weight"] = pair.down.detach().clone()
        state[f"base_model.model.{name}.lora_B.weight"] = pair.up.detach().clone()
    save_file(state, tmp_path / "adapter_model.safetensors")
    first = next(iter(adapter.modules))
    config = {
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {},
        "alpha_pattern": {first: 2},
        "target_modules": ["to_q"],
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    exact = deltas(adapter)
    for name, delta in deltas(load_adapter(tmp_path)).items():
        torch.testing.assert_close(delta, exact[name] * (0.5 if name == first else 2))


def test_reading_what_diffusers_writes(tmp_path, unet, make_adapter, make_pipeline, deltas):
    """R-07: a file saved by diffusers with its metadata, alpha != rank, keeps its strength."""
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    adapter = make_adapter(unet, rank=4, alpha=2)
    unet.add_adapter(LoraConfig(r=4, lora_alpha=2, target_modules=list(adapter.modules)))
    modules = dict(unet.named_modules())
    for name, pair in adapter.modules.items():
        modules[name].lora_A["default"].weight.data.copy_(pair.down.data)
        modules[name].lora_B["default"].weight.data.copy_(pair.up.data)
    make_pipeline(unet).save_lora_weights(
        tmp_path, unet_lora_layers=get_peft_model_state_dict(unet), **_collate_lora_metadata({"unet": unet})
    )
    read = load_adapter(tmp_path / "pytorch_lora_weights.safetensors")
    assert read.notes["sdlora.trained_alpha"] == "2"
    exact = deltas(adapter)
    assert set(read.modules) == set(exact)
    for name, delta in deltas(read).items():
        torch.testing.assert_close(delta, exact[name])


@pytest.mark.parametrize("spelling", ["lora", "processor"])
def test_reading_old_diffusers_files(unet, make_adapter, deltas, spelling):
    """R-07: `.lora.down/.up` and `processor.to_q_lora` files of older scripts."""
    adapter = make_adapter(unet, alpha=4)
    state = {}
    for name, pair in adapter.modules.items():
        block, _, projection = name.removesuffix(".0").rpartition(".")
        key = f"unet.{name}.lora" if spelling == "lora" else f"unet.{block}.processor.{projection}_lora"
        state[f"{key}.down.weight"], state[f"{key}.up.weight"] = pair.down.detach(), pair.up.detach()
    exact = deltas(adapter)
    read = deltas(state_to_adapter(state))
    assert set(read) == set(exact)
    assert all(torch.equal(read[name], exact[name]) for name in exact)


def test_text_encoder_modules_survive_conversion(unet, make_adapter):
    """R-07: a file with text encoder modules keeps them, in both dialects."""
    adapter = make_adapter(unet, alpha=4)
    name = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    adapter.modules[name] = LowRank(torch.ones(4, 8), torch.ones(8, 4))
    for state in (adapter_to_diffusers(adapter), adapter_to_kohya(adapter)):
        assert set(state_to_adapter(state).modules) == set(adapter.modules)
    assert f"{name}.lora_A.weight" in adapter_to_diffusers(adapter)


def test_damaged_tensors_are_named(unet, make_adapter):
    """R-25 R-01: half pairs, foreign tensors and pairs that do not fit are errors that name them."""
    state = adapter_to_kohya(make_adapter(unet))
    first = next(key for key in state if key.endswith("lora_up.weight"))
    with raises(AdapterError, "lora.incomplete-modules", shows="down_blocks.0"):
        state_to_adapter({key: tensor for key, tensor in state.items() if key != first})
    with raises(AdapterError, "lora.unknown-tensors", shows="bogus.weight"):
        state_to_adapter({**state, "bogus.weight": torch.ones(1)})
    with raises(AdapterError, "lora.shapes", shows="down_blocks.0"):
        state_to_adapter({**state, first: torch.ones(32, 3)})


def test_fp16_rounding_is_measured(unet, make_adapter, deltas):
    """R-36: the relative error of the whole change, as the products have it."""
    adapter = make_adapter(unet, alpha=2)
    rounded, rounding = round_adapter(adapter, "fp16")
    assert rounding.used == "fp16"
    assert rounded.dtype == torch.float16
    exact, close = deltas(adapter), deltas(rounded)
    error = sum((exact[name] - close[name]).square().sum() for name in exact)
    norm = sum(delta.square().sum() for delta in exact.values())
    assert rounding.relative_error == pytest.approx(float((error / norm).sqrt()), rel=1e-3)
    assert 1e-5 < rounding.relative_error < 1e-3
    assert rounding.newly_zero_share == 0


def test_a_device_without_float64(unet, make_adapter, without_doubles):
    """R-36: on MPS an adapter is folded, rounded and measured as everywhere."""
    adapter = make_adapter(unet, rank=4, alpha=3)
    modules = {
        name: LowRank(without_doubles(pair.down), without_doubles(pair.up))
        for name, pair in adapter.modules.items()
    }
    rounded, rounding = round_adapter(adapter)
    there, same = round_adapter(replace(adapter, modules=modules))
    assert same == rounding
    assert all(torch.equal(pair.up, there.modules[name].up) for name, pair in rounded.modules.items())


def test_what_fp16_cannot_hold_stays_fp32(unet, make_adapter):
    """R-36: tiny values (0.1 % newly zero or an error above 1e-3) and too large ones keep fp32."""
    for size in (1e-6, 1e-9, 1e6):
        adapter = make_adapter(unet, size=size)
        kept, rounding = round_adapter(adapter, "fp16")
        assert rounding.asked == "fp16"
        assert rounding.used == "fp32", size
        assert kept.dtype == torch.float32
        assert relative_error(adapter, kept) < 1e-6
    assert round_adapter(make_adapter(unet, size=1e-9), "fp16")[1].newly_zero_share > 0.3


def test_newly_zero_elements_alone_keep_fp32(unet, make_adapter):
    """R-36: 0.1 % of elements that vanish are too many even if they weigh nothing."""
    adapter = make_adapter(unet)
    for pair in adapter.modules.values():
        pair.up.data.view(-1)[::50] = 1e-9
    _, rounding = round_adapter(adapter, "fp16")
    assert rounding.relative_error > 0
    assert 1e-3 < rounding.newly_zero_share < 0.1
    assert rounding.used == "fp32"


def test_bf16_on_request(unet, make_adapter):
    """R-36: bf16 is some 2e-3 off, and is written when asked for."""
    rounded, rounding = round_adapter(make_adapter(unet), "bf16")
    assert rounding.used == "bf16"
    assert rounded.dtype == torch.bfloat16
    assert 1e-3 < rounding.relative_error < 1e-2
