"""Tensors as the original code names them, written by the rules of its layouts, not by diffusers'."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}
OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def original_unet_name(name: str, layers: int, up_attends: list[bool]) -> str:
    """A UNet tensor's name in the original code; blocks are counted through, level by level."""
    stem, kind = name.rsplit(".", 1)
    if stem in ENDS:
        return f"{ENDS[stem]}.{kind}"
    block, *rest = name.split(".")
    if block == "mid_block":
        part, number, *rest = rest
        place = "middle_block.1" if part == "attentions" else f"middle_block.{2 * int(number)}"
    else:
        level, part, number, *rest = rest
        first = int(level) * (layers + 1)
        if part == "downsamplers":
            return f"input_blocks.{first + layers + 1}.0.op.{kind}"
        if part == "upsamplers":
            return f"output_blocks.{first + layers}.{2 if up_attends[int(level)] else 1}.conv.{kind}"
        at = first + int(number)
        place = f"input_blocks.{at + 1}" if block == "down_blocks" else f"output_blocks.{at}"
        place += ".1" if part == "attentions" else ".0"
    if part == "resnets":
        rest[0] = RESNET[rest[0]]
    return ".".join([place, *rest])


def original_vae_name(name: str, levels: int) -> str:
    """A VAE tensor's name in the original code, which counts the decoder's levels from the other end."""
    side, block, *rest = name.split(".")
    if block == "conv_norm_out":
        return ".".join([side, "norm_out", *rest])
    if block == "mid_block":
        part, number, *rest = rest
        place = "mid.attn_1" if part == "attentions" else f"mid.block_{int(number) + 1}"
    elif block in ("down_blocks", "up_blocks"):
        level, part, number, *rest = rest
        place = f"down.{level}" if block == "down_blocks" else f"up.{levels - 1 - int(level)}"
        place += f".block.{number}" if part == "resnets" else f".{part.removesuffix('rs')}"
    else:
        return name
    if place == "mid.attn_1":
        rest = [ATTENTION[rest[0]], rest[-1]]
    elif rest[0] == "conv_shortcut":
        rest[0] = "nin_shortcut"
    return ".".join([side, place, *rest])


def original_vae(vae: AutoencoderKL) -> dict[str, Tensor]:
    """A VAE by original names; its attention was made of 1x1 convolutions."""
    tensors = {}
    for name, tensor in vae.state_dict().items():
        new = original_vae_name(name, len(vae.config.block_out_channels))
        is_matrix = "attn_1" in new and tensor.ndim == 2
        tensors[new] = tensor[:, :, None, None] if is_matrix else tensor
    return tensors


def original_unet(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """A UNet by original names."""
    attends = ["CrossAttn" in kind for kind in unet.config.up_block_types]
    return {
        original_unet_name(name, unet.config.layers_per_block, attends): tensor
        for name, tensor in unet.state_dict().items()
    }


def open_clip(encoder: Any, *, whole_tower: bool) -> dict[str, Tensor]:
    """A text encoder by OpenCLIP's names, where q, k and v are one matrix.

    Args:
        whole_tower: Add the last layer and the projection that Stable Diffusion 2 does not read.
    """
    states = {name.removeprefix("text_model."): tensor for name, tensor in encoder.state_dict().items()}
    tensors = {
        "token_embedding.weight": states["embeddings.token_embedding.weight"],
        "positional_embedding": states["embeddings.position_embedding.weight"],
        "ln_final.weight": states["final_layer_norm.weight"],
        "ln_final.bias": states["final_layer_norm.bias"],
        "logit_scale": torch.tensor(1.0),
    }
    for number in range(encoder.config.num_hidden_layers):
        stem, new = f"encoder.layers.{number}", f"transformer.resblocks.{number}"
        for kind in ("weight", "bias"):
            parts = [states[f"{stem}.self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
            tensors[f"{new}.attn.in_proj_{kind}"] = torch.cat(parts)
            for old, name in OPEN_CLIP.items():
                tensors[f"{new}.{name}.{kind}"] = states[f"{stem}.{old}.{kind}"]
    if "text_projection.weight" in states:
        tensors["text_projection"] = states["text_projection.weight"].T
    if whole_tower:
        last = f"resblocks.{encoder.config.num_hidden_layers - 1}."
        extra = {n.replace(last, "resblocks.99."): t + 1 for n, t in tensors.items() if last in n}
        width = encoder.config.hidden_size
        tensors |= extra | {"text_projection": torch.ones(width, width)}
    return tensors


def single_file(pipeline: Any) -> dict[str, Tensor]:
    """All tensors of a pipeline as its family's original code saves them."""
    texts: dict[str, Mapping[str, Tensor]]
    clip = {
        f"text_model.{name.removeprefix('text_model.')}": tensor
        for name, tensor in pipeline.text_encoder.state_dict().items()
    }
    if hasattr(pipeline, "text_encoder_2"):
        second = open_clip(pipeline.text_encoder_2, whole_tower=False)
        texts = {"conditioner.embedders.0.transformer.": clip, "conditioner.embedders.1.model.": second}
    elif pipeline.unet.config.use_linear_projection:
        texts = {"cond_stage_model.model.": open_clip(pipeline.text_encoder, whole_tower=True)}
    else:
        texts = {"cond_stage_model.transformer.": clip}
    parts = {
        "model.diffusion_model.": original_unet(pipeline.unet),
        "first_stage_model.": original_vae(pipeline.vae),
        **texts,
    }
    return {
        prefix + name: tensor.contiguous() for prefix, part in parts.items() for name, tensor in part.items()
    }
