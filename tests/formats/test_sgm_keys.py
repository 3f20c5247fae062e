"""SDXL's block names in the original code, against a second rule: walking the UNet as it is executed."""

from __future__ import annotations

import pytest
import torch

from sdlora.errors import AdapterError
from sdlora.formats.files import inspect_adapter, save_adapter
from sdlora.formats.keys import layers_per_block, module_to_sgm, sgm_to_module
from sdlora.formats.read import state_to_adapter
from sdlora.formats.write import adapter_to_kohya
from sdlora.lora.attach import count_parameters, match_targets
from sdlora.lora.layers import carrier_layers
from tests.checks import raises
from tests.lora_fixtures import create_adapter

# The layers of the original code's ResBlock, in the order of execution, beside those of diffusers.
RESNET = (("conv1", "in_layers.2"), ("time_emb_proj", "emb_layers.1"), ("conv2", "out_layers.3"))


def inner_names(module, ours, theirs):
    """The adapted layers inside a resnet (named anew) or a transformer (named alike)."""
    if hasattr(module, "time_emb_proj"):
        pairs = [*RESNET, ("conv_shortcut", "skip_connection")]
        return {f"{ours}.{a}": f"{theirs}.{b}" for a, b in pairs if getattr(module, a) is not None}
    return {f"{ours}.{name}": f"{theirs}.{name}" for name in carrier_layers(module)}


def golden_names(unet):
    """diffusers' name → the original code's, found by walking the network as the original code builds it.

    The original UNet is a flat list: one entry for conv_in, for each resnet with its attention, and for each
    downsampler; on the way up an upsampler joins the entry before it.
    """
    names = {"conv_in": "input_blocks.0.0", "conv_out": "out.2"}
    names |= {f"time_embedding.linear_{n + 1}": f"time_embed.{2 * n}" for n in (0, 1)}
    names |= {f"add_embedding.linear_{n + 1}": f"label_emb.0.{2 * n}" for n in (0, 1)}
    entry = 1
    for i, block in enumerate(unet.down_blocks):
        attentions = getattr(block, "attentions", [])
        for j, resnet in enumerate(block.resnets):
            names |= inner_names(resnet, f"down_blocks.{i}.resnets.{j}", f"input_blocks.{entry}.0")
            if attentions:
                ours = f"down_blocks.{i}.attentions.{j}"
                names |= inner_names(attentions[j], ours, f"input_blocks.{entry}.1")
            entry += 1
        if block.downsamplers:
            names[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{entry}.0.op"
            entry += 1
    names |= inner_names(unet.mid_block.resnets[0], "mid_block.resnets.0", "middle_block.0")
    names |= inner_names(unet.mid_block.attentions[0], "mid_block.attentions.0", "middle_block.1")
    names |= inner_names(unet.mid_block.resnets[1], "mid_block.resnets.1", "middle_block.2")
    entry = 0
    for i, block in enumerate(unet.up_blocks):
        attentions = getattr(block, "attentions", [])
        for j, resnet in enumerate(block.resnets):
            names |= inner_names(resnet, f"up_blocks.{i}.resnets.{j}", f"output_blocks.{entry}.0")
            if attentions:
                ours = f"up_blocks.{i}.attentions.{j}"
                names |= inner_names(attentions[j], ours, f"output_blocks.{entry}.1")
            entry += 1
        if block.upsamplers:
            names[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{entry - 1}.2.conv"
    return names


def test_every_layer_of_sdxl(sdxl):
    """R-07: each of SDXL's layers has the golden name, and reads back."""
    golden = golden_names(sdxl)
    assert set(golden) == set(carrier_layers(sdxl))
    assert len(set(golden.values())) == len(golden)
    for module, name in golden.items():
        assert module_to_sgm(module) == name
        assert sgm_to_module(name) == module


@pytest.mark.parametrize(
    ("targets", "num_modules"), [("attention", 560), ("all-linear", 722), ("all", 788), ("style-only", 80)]
)
def test_kohya_keys_of_sdxl_are_the_golden_list(sdxl, targets, num_modules):
    """R-07: the keys of an SDXL LoRA as kohya's tools write them, no more, no less."""
    names = match_targets(sdxl, [targets])
    assert len(names) == num_modules
    golden = golden_names(sdxl)
    keys = adapter_to_kohya(create_adapter(sdxl, names, 1, 1, seed=0, family="sdxl"))
    assert set(keys) == {
        f"lora_unet_{golden[name].replace('.', '_')}.{part}"
        for name in names
        for part in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    assert "lora_unet_output_blocks_1_1_transformer_blocks_9_attn2_to_out_0.lora_up.weight" in keys
    if targets != "style-only":
        assert "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q.alpha" in keys
        assert "lora_unet_middle_block_1_transformer_blocks_0_attn2_to_v.lora_down.weight" in keys


@pytest.mark.parametrize(
    ("name", "family", "num_modules", "per_rank"),
    [("sd15", "sd1", 128, 199_296), ("sdxl", "sdxl", 560, 1_451_520)],
)
def test_sizes_of_files(request, tmp_path, name, family, num_modules, per_rank):
    """R-16: attention of SD 1.5 costs 0.4 MB a rank in fp16, that of SDXL 2.9 MB; info finds the family."""
    unet = request.getfixturevalue(name)
    names = match_targets(unet, ["attention"])
    assert count_parameters(unet, dict.fromkeys(names, 1)) == per_rank
    adapter = create_adapter(unet, names, 1, 1, seed=0, family=family)
    for pair in adapter.modules.values():
        pair.down, pair.up = (torch.ones(t.shape, dtype=torch.float16) for t in (pair.down, pair.up))
    for dialect in ("diffusers", "kohya"):
        path = save_adapter(tmp_path / f"{dialect}.safetensors", adapter, dialect=dialect, metadata={})
        assert 2 * per_rank < path.stat().st_size < 1.2 * 2 * per_rank
        info = inspect_adapter(path)
        assert (info.family, info.num_modules, info.num_parameters) == (family, num_modules, per_rank)


@pytest.mark.parametrize("layers", [1, 3])
def test_slim_and_deep_variants(make_family, layers):
    """R-07: any number of layers and blocks; the file notes a number that is not 2, and is read by it."""
    unet = make_family(
        "sdxl",
        layers_per_block=layers,
        block_out_channels=(16,) * 4,
        down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * 3),
        up_block_types=(*("CrossAttnUpBlock2D",) * 3, "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 1, 2),
    )["unet"]
    golden = golden_names(unet)
    assert set(golden) == set(carrier_layers(unet))
    adapter = create_adapter(unet, list(golden), 1, 1, seed=0, family="sdxl")
    assert adapter.notes == {"sdlora.layers_per_block": str(layers)}
    state = adapter_to_kohya(adapter)
    assert {key.split(".")[0] for key in state} == {
        f"lora_unet_{name.replace('.', '_')}" for name in golden.values()
    }
    assert set(state_to_adapter(state, adapter.notes).modules) == set(golden)


def test_an_upsampler_without_attention_is_read():
    """R-07: the original code then counts it as part 1, diffusers as part 2; both are read."""
    for part in (1, 2):
        assert sgm_to_module(f"output_blocks.2.{part}.conv") == "up_blocks.0.upsamplers.0.conv"


def test_a_name_that_is_not_there_is_refused():
    """R-07: better an error than a file whose modules are lost."""
    for module in ("down_blocks.0.attentions.2.proj_in", "some.layer", "down_blocks.0.motion.0.proj_in"):
        with raises(AdapterError, "lora.module-name", shows=(module, "SDXL")):
            module_to_sgm(module)
    with raises(AdapterError, "lora.layers-per-block", shows="[1, 2, 2]"):
        layers_per_block({"sdlora.layers_per_block": "[1, 2, 2]"})
