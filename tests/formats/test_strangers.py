"""Files of other tools, each spelled by hand: read rightly, or refused for what they are."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from sdlora.errors import AdapterError
from sdlora.formats.files import inspect_adapter, load_adapter
from sdlora.formats.read import state_to_adapter
from sdlora.formats.write import adapter_to_diffusers
from sdlora.lora.attach import mounted
from tests.checks import raises

Q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
CLIP = "text_model.encoder.layers.0.self_attn.q_proj"


def pair(key, width=16, *, parts=("lora_A", "lora_B"), kernel=(), alpha=None):
    """The two factors of a module, rank 4."""
    state = {
        f"{key}.{parts[0]}.weight": torch.randn(4, width, *kernel),
        f"{key}.{parts[1]}.weight": torch.randn(width, 4, *kernel),
    }
    return state if alpha is None else state | {f"{key}.alpha": torch.tensor(alpha)}


@pytest.mark.parametrize(
    ("key", "width", "module"),
    [
        (f"clip_l.{CLIP}", 768, f"text_encoder.{CLIP}"),
        (f"clip_g.{CLIP}", 1280, f"text_encoder_2.{CLIP}"),
        (f"clip_l.{CLIP.removeprefix('text_model.')}", 768, f"text_encoder.{CLIP}"),
        (f"base_model.model.{CLIP}", 768, f"text_encoder.{CLIP}"),
        (f"base_model.model.{CLIP}", 1280, f"text_encoder_2.{CLIP}"),
        (f"base_model.model.{CLIP.removeprefix('text_model.')}", 1024, f"text_encoder.{CLIP}"),
    ],
)
def test_text_encoders_without_their_component(key, width, module):
    """R-07: OneTrainer's names, and PEFT's folders, of which the width tells the encoder."""
    state = pair(key, width)
    adapter = state_to_adapter(state)
    assert list(adapter.modules) == [module]
    assert torch.equal(adapter.modules[module].down, state[f"{key}.lora_A.weight"])
    assert all(name.startswith(module) for name in adapter_to_diffusers(adapter))


def test_onetrainer_file_for_sdxl():
    """R-07 R-41: its blocks have the names of the original code, with dots."""
    state = pair("unet.middle_block.1.transformer_blocks.0.attn2.to_k", alpha=2.0, width=2048)
    state |= pair(f"clip_l.{CLIP}", 768, alpha=2.0) | pair(f"clip_g.{CLIP}", 1280, alpha=2.0)
    adapter = state_to_adapter(state)
    assert adapter.family == "sdxl"
    attention = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    assert set(adapter.modules) == {attention, f"text_encoder.{CLIP}", f"text_encoder_2.{CLIP}"}


@pytest.mark.parametrize(
    "key",
    [
        "diffusion_model.double_blocks.0.img_attn.qkv",
        "diffusion_model.single_blocks.3.linear1",
        "diffusion_model.joint_blocks.0.x_block.attn.qkv",
        "base_model.model.transformer_blocks.0.attn.to_q",
        "base_model.model.single_transformer_blocks.0.attn.to_q",
        "unet.transformer.transformer_blocks.0.attn.to_q",
        "double_blocks.0.img_attn.proj",
    ],
)
def test_transformers_are_named_in_every_spelling(key):
    """R-25 R-40: a LoRA for Flux or SD 3 is refused as such."""
    with raises(AdapterError, "lora.transformer"):
        state_to_adapter(pair(key))


@pytest.mark.parametrize("prefix", ["", "unet.", "base_model.model.", "diffusion_model."])
def test_a_motion_lora_is_named(prefix):
    """R-25 R-40: AnimateDiff's modules are in no Stable Diffusion."""
    inner = "motion_modules.0.transformer_blocks.0.attn1.to_q"
    with raises(AdapterError, "lora.motion"):
        state_to_adapter(pair(f"{prefix}down_blocks.0.{inner}") | pair(f"{prefix}{Q}"))


@pytest.mark.parametrize(
    ("key", "parts"),
    [
        ("lora_unet_bogus_thing", ("lora_down", "lora_up")),
        ("lora_unet_down_blocks_0_bogus_0_conv", ("lora_down", "lora_up")),
        ("lora_te_bogus_layers_0_fc1", ("lora_down", "lora_up")),
        ("unet.bogus.0.to_q", ("lora_A", "lora_B")),
        ("diffusion_model.blocks.0.self_attn.q", ("lora_A", "lora_B")),
        ("base_model.model.model.layers.0.self_attn.q_proj", ("lora_A", "lora_B")),
    ],
)
def test_modules_of_other_networks_are_refused(key, parts):
    """R-07 R-25: what no loader would find is not read, so it is never written."""
    state = pair(key, parts=parts) | pair(f"unet.{Q}")
    with raises(AdapterError, "lora.other-network", shows="1 of 2"):
        state_to_adapter(state if not key.startswith("lora_") else pair(key, parts=parts) | kohya_pair())


def kohya_pair():
    return pair(f"lora_unet_{Q.replace('.', '_')}", parts=("lora_down", "lora_up"))


@pytest.mark.parametrize("name", ["mystyle.safetensors", "adapter_model.safetensors"])
def test_alpha_of_a_renamed_peft_file(tmp_path, name):
    """R-02: the configuration beside a PEFT file holds its alpha, whatever the file is called."""
    state = pair(f"base_model.model.{Q}")
    save_file(state, tmp_path / name)
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 16}), encoding="utf-8"
    )
    file = tmp_path / name
    expected = 4 * state[f"base_model.model.{Q}.lora_B.weight"]
    assert torch.allclose(load_adapter(file).modules[Q].up, expected)
    assert inspect_adapter(file).alphas == {16.0: 1}


def test_a_peft_file_alone_says_that_its_alpha_is_unknown(tmp_path):
    """R-02: without its configuration the strength is a guess, which the reader is told."""
    save_file(pair(f"base_model.model.{Q}"), tmp_path / "x.safetensors")
    lines = inspect_adapter(tmp_path / "x.safetensors").lines()
    assert any(line.startswith("alpha") and "adapter_config.json" in line for line in lines)
    save_file(pair(f"unet.{Q}"), tmp_path / "y.safetensors")
    assert not any("adapter_config" in line for line in inspect_adapter(tmp_path / "y.safetensors").lines())


@pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_lora_weights.bin", "style.ckpt"])
def test_a_folder_with_a_pickle(tmp_path, name):
    """R-25 R-44: the pickle is named, not opened."""
    torch.save(pair(Q), tmp_path / name)
    with raises(AdapterError, "file.pickle", shows=name):
        load_adapter(tmp_path)


def test_a_folder_of_folders(tmp_path):
    """R-25: PEFT writes one for each component; the message names them."""
    for part in ("unet", "text_encoder"):
        (tmp_path / part).mkdir()
        save_file(pair(f"base_model.model.{Q}"), tmp_path / part / "adapter_model.safetensors")
    with raises(AdapterError, "lora.missing", shows=("text_encoder", "unet")):
        load_adapter(tmp_path)


def test_sdxl_without_its_second_text_encoder():
    """R-41: kohya numbers the first text encoder in files for SDXL alone."""
    state = pair(f"lora_te1_{CLIP.replace('.', '_')}", 768, parts=("lora_down", "lora_up"))
    assert state_to_adapter(state).family == "sdxl"


@pytest.mark.parametrize("linear", [True, False])
def test_1x1_factors_of_projections(make_unet, run, linear):
    """R-07: a linear layer and a 1x1 convolution are the same map, so either spelling fits either base."""
    unet = make_unet(use_linear_projection=linear)
    names = ["mid_block.attentions.0.proj_in", "mid_block.attentions.0.proj_out"]
    width = unet.mid_block.attentions[0].proj_in.weight.shape[0]
    torch.manual_seed(0)
    tensors = {key: value for name in names for key, value in pair(f"unet.{name}", width).items()}
    outputs = []
    for kernel in ((), (1, 1)):
        state = {key: value.reshape(*value.shape[:2], *kernel) for key, value in tensors.items()}
        with mounted(unet, [(state_to_adapter(state), 1.0)]):
            outputs.append(run(unet))
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], run(unet))


@pytest.mark.parametrize(("family", "ndim"), [("sd1", 4), ("sd2", 2), ("sdxl", 2)])
def test_projections_have_the_shape_of_their_family(family, ndim):
    """R-01: a converted file has the shapes that stock diffusers needs for that family."""
    name = "mid_block.attentions.0.proj_in"
    kernel = (1, 1) if ndim == 2 else ()
    version = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}[family]
    notes = {"ss_base_model_version": version}
    state = pair(f"unet.{name}", kernel=kernel)
    assert state_to_adapter(state, notes).modules[name].down.ndim == ndim
    own = state_to_adapter(state, {"sdlora.family": family}).modules[name]
    assert own.down.shape == state[f"unet.{name}.lora_A.weight"].shape
