"""Module names between dots and underscores."""

from __future__ import annotations

import pytest

from sdlora.errors import AdapterError
from sdlora.formats.keys import clean_module, dialect_of, kohya_to_module, module_to_kohya, split_key
from sdlora.lora.layers import carrier_layers
from tests.checks import raises

BLOCK = "mid_block.attentions.0.transformer_blocks.0"


def test_every_layer_of_sd15_comes_back(sd15):
    """R-07: the kohya spelling of every layer of SD 1.5 reads back as that layer, and no two are equal."""
    names = list(carrier_layers(sd15))
    assert len(names) > 280
    keys = [module_to_kohya(name) for name in names]
    assert [kohya_to_module(key) for key in keys] == names
    assert len(set(keys)) == len(names)
    assert all(set(key) <= set("abcdefghijklmnopqrstuvwxyz0123456789_") for key in keys)


@pytest.mark.parametrize(
    ("module", "key"),
    [
        (
            "text_encoder.text_model.encoder.layers.3.self_attn.q_proj",
            "lora_te_text_model_encoder_layers_3_self_attn_q_proj",
        ),
        ("text_encoder.text_model.encoder.layers.3.mlp.fc1", "lora_te_text_model_encoder_layers_3_mlp_fc1"),
        (f"{BLOCK}.ff.net.0.proj", "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj"),
        ("down_blocks.1.resnets.0.time_emb_proj", "lora_unet_down_blocks_1_resnets_0_time_emb_proj"),
    ],
)
def test_kohya_names(module, key):
    """R-07: the spelling that kohya's own code makes."""
    assert module_to_kohya(module) == key
    assert kohya_to_module(key) == module


def test_two_text_encoders_are_numbered():
    """R-07: in a file for SDXL the first is te1, also without the second."""
    first = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    second = "text_encoder_2.text_model.encoder.layers.0.mlp.fc1"
    assert module_to_kohya(first, sdxl=True) == "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    assert module_to_kohya(second, sdxl=True) == "lora_te2_text_model_encoder_layers_0_mlp_fc1"
    assert kohya_to_module("lora_te1_text_model_encoder_layers_0_mlp_fc1") == first


def test_a_name_that_kohya_cannot_give_back_is_refused():
    """R-07: better an error than a file whose modules are lost."""
    with raises(AdapterError, "lora.module-name", shows=("my_block.my_layer", "--format diffusers")):
        module_to_kohya("my_block.my_layer")


@pytest.mark.parametrize(
    "wrapped",
    [
        f"module.{BLOCK}.attn1.to_q",
        f"_orig_mod.{BLOCK}.attn1.to_q",
        f"module._orig_mod.{BLOCK}.attn1.to_q",
        f"base_model.model.{BLOCK}.attn1.to_q",
        f"base_model.model.unet.{BLOCK}.attn1.to_q.base_layer",
        f"unet.unet.{BLOCK}.attn1.to_q",
        f"{BLOCK}._orig_mod.attn1.to_q",
    ],
)
def test_wrappers_leave_no_trace(wrapped):
    """R-07: whatever DDP, compile or PEFT put into a name is taken out."""
    assert clean_module(wrapped) == f"{BLOCK}.attn1.to_q"


@pytest.mark.parametrize(
    ("key", "module", "part"),
    [
        (f"unet.{BLOCK}.attn1.to_q.lora_A.weight", f"{BLOCK}.attn1.to_q", "down"),
        (f"{BLOCK}.attn1.to_q.lora_B.weight", f"{BLOCK}.attn1.to_q", "up"),
        (f"base_model.model.{BLOCK}.attn1.to_q.lora_A.default.weight", f"{BLOCK}.attn1.to_q", "down"),
        (f"unet.{BLOCK}.attn1.to_out.0.lora.up.weight", f"{BLOCK}.attn1.to_out.0", "up"),
        (f"unet.{BLOCK}.attn1.processor.to_out_lora.up.weight", f"{BLOCK}.attn1.to_out.0", "up"),
        (f"{BLOCK}.attn2.processor.to_k_lora.down.weight", f"{BLOCK}.attn2.to_k", "down"),
        (f"unet.{BLOCK}.ff.net.2.lora_down.weight", f"{BLOCK}.ff.net.2", "down"),
        ("lora_unet_mid_block_attentions_0_proj_in.alpha", "mid_block.attentions.0.proj_in", "alpha"),
        ("lora_unet_input_blocks_1_1_proj_in.alpha", "down_blocks.0.attentions.0.proj_in", "alpha"),
        ("lycoris_mid_block_attentions_0_proj_in.lora_up.weight", "mid_block.attentions.0.proj_in", "up"),
        ("diffusion_model.middle_block.1.proj_in.lora_A.weight", "mid_block.attentions.0.proj_in", "down"),
        (
            "text_encoders.clip_g.transformer.text_model.encoder.layers.0.mlp.fc1.lora_up.weight",
            "text_encoder_2.text_model.encoder.layers.0.mlp.fc1",
            "up",
        ),
        (f"unet.{BLOCK}.attn1.processor.to_out.lora_up.weight", f"{BLOCK}.attn1.to_out.0", "up"),
        (
            "text_encoder.encoder.layers.0.self_attn.q_proj.lora_A.weight",
            "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
            "down",
        ),
        (
            "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.up.weight",
            "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
            "up",
        ),
    ],
)
def test_keys_of_all_dialects(key, module, part):
    """R-07: reading knows today's and yesterday's spellings."""
    assert split_key(key) == (module, part)


@pytest.mark.parametrize(
    ("keys", "key", "shows"),
    [
        (
            ["model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.encoder.conv_in.weight"],
            "lora.not-a-lora",
            "base model",
        ),
        (["encoder.conv_in.weight", "decoder.conv_in.weight", "quant_conv.weight"], "lora.not-a-lora", "VAE"),
        (["down_blocks.0.resnets.0.conv1.weight", "conv_in.weight"], "lora.not-a-lora", "full UNet"),
        (["down_blocks.0.attn1.to_q.down", "down_blocks.0.attn1.to_q.up"], "lora.not-a-lora", "checkpoint"),
        (["text_model.encoder.layers.0.mlp.fc1.weight"], "lora.not-a-lora", "text encoder"),
        (["control_model.input_blocks.0.0.weight"], "lora.not-a-lora", "ControlNet"),
        (["emb_params"], "lora.not-a-lora", "textual inversion"),
        (["lora_unet_mid_block_attentions_0_proj_in.hada_w1_a"], "lora.other-kind", "LoHa"),
        (["lora_unet_mid_block_attentions_0_proj_in.lokr_w1"], "lora.other-kind", "LoKr"),
        (["lora_unet_x.diff"], "lora.other-kind", "whole weight differences"),
        (["lora_unet_x.lora_mid.weight"], "lora.other-kind", "Tucker"),
        (["unet.x.lora_A.weight", "unet.x.lora_B.bias"], "lora.other-kind", "biases"),
        (["bundle_emb.x.clip_l"], "lora.other-kind", "textual inversion"),
        (["transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight"], "lora.transformer", "Flux"),
        (["lora_unet_double_blocks_0_img_attn_proj.lora_down.weight"], "lora.transformer", "SD 3"),
        (["lora_unet_x.lora_down.weight", "lora_te3_y.lora_down.weight"], "lora.dialect", "lora_te3_y"),
        (["lora_prior_unet_x.lora_down.weight"], "lora.dialect", "lora_prior_unet_x"),
        (["x.weight", "y.bias"], "lora.not-a-lora", "x.weight, y.bias"),
        ([], "lora.not-a-lora", "no tensors"),
    ],
)
def test_other_kinds_are_named(keys, key, shows):
    """R-25 R-40: a file of another kind is named."""
    with raises(AdapterError, key, shows=shows):
        dialect_of(keys)
