"""Configurations from shapes, against the published ones, at full size and without weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdlora.config import BaseSection
from sdlora.errors import ModelError
from sdlora.models.infer_config import text_config, unet_config, vae_config
from sdlora.models.info import inspect_base
from sdlora.models.weights import denoiser_names, empty_denoiser
from tests.checks import raises
from tests.models.single_file.original import open_clip, original_unet, original_vae, single_file

ATTENDS = "CrossAttnDownBlock2D"
UNETS: dict[str, dict[str, Any]] = {
    "sd1": {
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
        "block_out_channels": [320, 640, 1280, 1280],
    },
    "sd2": {
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20],
        "block_out_channels": [320, 640, 1280, 1280],
        "use_linear_projection": True,
    },
    "sdxl": {
        "cross_attention_dim": 2048,
        "attention_head_dim": [5, 10, 20],
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", ATTENDS, ATTENDS],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 10],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    # Distilled as Segmind's SSD-1B: shorter levels, other depths going up, no attention in the middle.
    "slim": {
        "cross_attention_dim": 2048,
        "attention_head_dim": [5, 10, 20],
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", ATTENDS, ATTENDS],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 4],
        "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
        "mid_block_type": "UNetMidBlock2D",
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    # One residual layer in each level and no middle block, as BK-SDM has it.
    "no-middle": {
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
        "block_out_channels": [320, 640, 1280],
        "down_block_types": [ATTENDS] * 3,
        "up_block_types": ["CrossAttnUpBlock2D"] * 3,
        "layers_per_block": 1,
        "mid_block_type": None,
    },
    "one-level": {
        "cross_attention_dim": 64,
        "attention_head_dim": 8,
        "block_out_channels": [64],
        "down_block_types": [ATTENDS],
        "up_block_types": ["CrossAttnUpBlock2D"],
        "layers_per_block": 3,
    },
}
VAE: dict[str, Any] = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
}
NUM_TENSORS = {"sd1": 686, "sd2": 686, "sdxl": 1680}


@pytest.mark.parametrize("name", UNETS)
def test_unets_are_told_by_their_shapes(name: str) -> None:
    """R-40: from the original names and shapes back to the configuration, whatever the architecture."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNETS[name])
    names = dict(zip(unet.state_dict(), original_unet(unet), strict=True))
    assert len(set(names.values())) == len(names) == NUM_TENSORS.get(name, len(names))
    shapes = {names[old]: tuple(tensor.shape) for old, tensor in unet.state_dict().items()}
    with torch.device("meta"):
        again = UNet2DConditionModel.from_config(unet_config(shapes, pooled=1280))
    assert {n: t.shape for n, t in again.state_dict().items()} == {
        n: t.shape for n, t in unet.state_dict().items()
    }

    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value

    for key, value in unet.config.items():
        assert key in ("sample_size", "_use_default_values") or plain(again.config[key]) == plain(value), key


def test_vae_is_told_by_its_shapes() -> None:
    """R-40: by original and by diffusers' names."""
    with torch.device("meta"):
        vae = AutoencoderKL(**VAE)
    original = original_vae(vae)
    assert len(original) == 248
    for tensors in (original, vae.state_dict()):
        found = vae_config({name: tuple(tensor.shape) for name, tensor in tensors.items()})
        assert {key: vae.config[key] for key in found if key != "_class_name"} == {
            key: value for key, value in found.items() if key != "_class_name"
        }


TEXTS = {
    "clip-l": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
    },
    "clip-h": {
        "hidden_size": 1024,
        "num_hidden_layers": 23,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
    "clip-g": {
        "hidden_size": 1280,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "intermediate_size": 5120,
        "projection_dim": 1280,
    },
}


@pytest.mark.parametrize("name", TEXTS)
def test_text_encoders_are_told_by_their_shapes(name: str) -> None:
    """R-40: heads of 64 channels; Stable Diffusion 2 leaves out the last of OpenCLIP's 24 layers."""
    model = CLIPTextModelWithProjection if name == "clip-g" else CLIPTextModel
    with torch.device("meta"):
        encoder = model(CLIPTextConfig(**TEXTS[name]))
        if name == "clip-l":
            states = encoder.state_dict()
            shapes = {
                f"text_model.{n.removeprefix('text_model.')}": tuple(t.shape) for n, t in states.items()
            }
            found = text_config(shapes)
        else:
            tensors = open_clip(encoder, whole_tower=name == "clip-h")
            shapes = {n: tuple(tensor.shape) for n, tensor in tensors.items()}
            found = text_config(shapes, drop_last=name == "clip-h")
    assert found == {"vocab_size": 49408, "max_position_embeddings": 77, **TEXTS[name]}


def test_a_text_encoder_saved_without_its_last_layer_keeps_all() -> None:
    """R-40: files that diffusers' script made from a folder hold 23 layers and no projection."""
    with torch.device("meta"):
        encoder = CLIPTextModel(CLIPTextConfig(**TEXTS["clip-h"]))
        tensors = open_clip(encoder, whole_tower=False)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert text_config(shapes, drop_last=True)["num_hidden_layers"] == 23


def test_what_no_configuration_can_say_is_refused() -> None:
    """R-40: widths that the groups do not divide; attention behind some layers only."""
    shapes = {
        "input_blocks.0.0.weight": (48, 4, 3, 3),
        "input_blocks.1.0.out_layers.3.weight": (48, 48, 3, 3),
        "out.2.weight": (4, 48, 3, 3),
    }
    with raises(ModelError, "base.groups", shows="48 channels"):
        unet_config(shapes)
    wide = {name: (64, *shape[1:]) for name, shape in shapes.items()}
    more = {
        "input_blocks.2.0.out_layers.3.weight": (64, 64, 3, 3),
        "input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": (64, 32),
    }
    with raises(ModelError, "base.layout"):
        unet_config({**wide, **more})


# Tensors, and GB in fp16, as published (SD 2.1's file is fp32, twice as large).
PUBLISHED = {"sd1": (1130, 2.13), "sd2": (1228, 2.61), "sdxl": (2514, 6.94)}


@pytest.mark.parametrize("family", PUBLISHED)
def test_published_bases_are_read_whole(family: str, tmp_path: Path) -> None:
    """R-25, R-40: files of the real layout and size, with holes for weights; every tensor has a place."""
    with torch.device("meta"):
        parts = SimpleNamespace(
            unet=UNet2DConditionModel(**UNETS[family]),
            vae=AutoencoderKL(**VAE),
            text_encoder=CLIPTextModel(CLIPTextConfig(**TEXTS["clip-h" if family == "sd2" else "clip-l"])),
        )
        if family == "sdxl":
            parts.text_encoder_2 = CLIPTextModelWithProjection(CLIPTextConfig(**TEXTS["clip-g"]))
        tensors = single_file(parts)
    file = tmp_path / f"{family}.safetensors"
    write_hole(file, tensors)
    assert len(tensors) == PUBLISHED[family][0]
    assert file.stat().st_size / 1e9 == pytest.approx(PUBLISHED[family][1], abs=0.01)
    info = inspect_base(BaseSection(source=str(file)))
    assert info.family == family
    assert info.denoiser_config["attention_head_dim"] == UNETS[family]["attention_head_dim"]
    unet = empty_denoiser(info).state_dict()
    names = denoiser_names(info.components["unet"])
    assert {new: tensors[old].shape for old, new in names.items()} == {n: t.shape for n, t in unet.items()}
    assert [info.components["vae"].config[key] for key in VAE] == list(VAE.values())
    assert info.components["text_encoder"].config["num_hidden_layers"] == (23 if family == "sd2" else 12)


def write_hole(file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """A safetensors file of fp16 zeros that takes no room."""
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in sorted(tensors.items()):
        start, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    with file.open("wb") as handle:
        handle.write(len(raw).to_bytes(8, "little") + raw)
        handle.truncate(8 + len(raw) + end)
