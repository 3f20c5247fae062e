"""Configurations of a base's components, inferred from the shapes of their original tensors.

Names are those of the original code (CompVis, Stability AI, OpenAI, OpenCLIP), without their prefix.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from sdlora.errors import ModelError

Shapes = Mapping[str, tuple[int, ...]]

# Not in any shape, and the same in every published base: eight heads in SD 1, else 64 channels per head;
# 32 groups in each normalization; six numbers in SDXL's time ids.
SD1_HEADS, HEAD_WIDTH, NUM_GROUPS, NUM_TIME_IDS = 8, 64, 32, 6

# In a VAE, by original and by diffusers' names: level and layer.
VAE_LAYER = re.compile(r"encoder\.down(?:_blocks)?\.(\d+)\.(?:block|resnets)\.(\d+)\.conv2\.weight")
# In a text encoder: embeddings of tokens and positions, the first layer's MLP, and each layer.
CLIP = (
    *("embeddings.token_embedding.weight", "embeddings.position_embedding.weight"),
    *("encoder.layers.0.mlp.fc1.weight", r"encoder\.layers\.(\d+)\."),
)
OPEN_CLIP = (
    *("token_embedding.weight", "positional_embedding"),
    *("transformer.resblocks.0.mlp.c_fc.weight", r"transformer\.resblocks\.(\d+)\."),
)


def unet_config(shapes: Shapes, pooled: int = 0) -> dict[str, Any]:
    """The configuration of a UNet2DConditionModel of any width, depth and places of attention.

    `pooled` is the width of the pooled text states, for SDXL.
    """
    num_inputs = 1 + max(int(found[1]) for found in _find(shapes, r"input_blocks\.(\d+)\."))
    downs = sorted(int(found[1]) for found in _find(shapes, r"input_blocks\.(\d+)\.0\.op\.weight"))
    per_level = downs[0] if downs else num_inputs
    num_levels, layers = len(downs) + 1, per_level - 1
    starts = [1 + level * per_level for level in range(num_levels)]
    widths = [shapes[f"input_blocks.{start}.0.out_layers.3.weight"][0] for start in starts]
    down = [_depths(shapes, "input_blocks", start, layers) for start in starts]
    up = [_depths(shapes, "output_blocks", level * per_level, per_level) for level in range(num_levels)]
    middle = _count(shapes, r"middle_block\.1\.transformer_blocks\.(\d+)\.")
    middle_type = "UNetMidBlock2DCrossAttn" if middle else "UNetMidBlock2D"
    is_linear = any(len(shapes[found[0]]) == 2 for found in _find(shapes, r".*\.1\.proj_in\.weight"))
    _check_groups(widths, "UNet")
    config = {
        "_class_name": "UNet2DConditionModel",
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "block_out_channels": widths,
        "layers_per_block": layers,
        "down_block_types": ["CrossAttnDownBlock2D" if any(depths) else "DownBlock2D" for depths in down],
        "up_block_types": ["CrossAttnUpBlock2D" if any(depths) else "UpBlock2D" for depths in up],
        "mid_block_type": middle_type if _find(shapes, r"middle_block\.") else None,
        "cross_attention_dim": next(
            (shapes[found[0]][1] for found in _find(shapes, r".*\.attn2\.to_k\.weight")), None
        ),
        "use_linear_projection": is_linear,
        "attention_head_dim": [max(1, width // HEAD_WIDTH) for width in widths] if is_linear else SD1_HEADS,
        **_transformer_layers(down, up, middle),
    }
    if "label_emb.0.0.weight" in shapes:
        inputs = shapes["label_emb.0.0.weight"][1]
        config["addition_embed_type"] = "text_time"
        config["addition_time_embed_dim"] = (inputs - pooled) // NUM_TIME_IDS
        config["projection_class_embeddings_input_dim"] = inputs
    return config


def vae_config(shapes: Shapes) -> dict[str, Any]:
    """The configuration of an AutoencoderKL, by original or diffusers' names, without its scaling."""
    layers = {
        (int(found[1]), int(found[2])): shape[0]
        for name, shape in shapes.items()
        if (found := VAE_LAYER.fullmatch(name))
    }
    widths = [width for (_, layer), width in sorted(layers.items()) if layer == 0]
    _check_groups(widths, "VAE")
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "block_out_channels": widths,
        "layers_per_block": len(layers) // len(widths),
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
    }


def text_config(shapes: Shapes, *, drop_last: bool = False) -> dict[str, Any]:
    """The configuration of a CLIPTextModel, by the names of OpenCLIP or of transformers.

    With `drop_last`, without the last layer of a whole OpenCLIP tower: SD 2 reads the states before it.
    """
    shapes = {name.removeprefix("text_model."): shape for name, shape in shapes.items()}
    tokens, positions, mlp, layers = OPEN_CLIP if "positional_embedding" in shapes else CLIP
    projection = shapes.get("text_projection")
    config = {
        "vocab_size": shapes[tokens][0],
        "hidden_size": shapes[tokens][1],
        "max_position_embeddings": shapes[positions][0],
        "num_hidden_layers": _count(shapes, layers) - bool(drop_last and projection),
        "num_attention_heads": max(1, shapes[tokens][1] // HEAD_WIDTH),
        "intermediate_size": shapes[mlp][0],
    }
    return config if projection is None or drop_last else {**config, "projection_dim": projection[1]}


def _find(shapes: Shapes, pattern: str) -> list[re.Match[str]]:
    """The names that begin with a pattern."""
    return [found for name in shapes if (found := re.match(pattern, name))]


def _count(shapes: Shapes, pattern: str) -> int:
    return len({found[1] for found in _find(shapes, pattern)})


def _depths(shapes: Shapes, blocks: str, start: int, count: int) -> list[int]:
    """Number of transformer blocks behind each of the residual layers from `start` on."""
    return [
        _count(shapes, rf"{blocks}\.{layer}\.1\.transformer_blocks\.(\d+)\.")
        for layer in range(start, start + count)
    ]


def _transformer_layers(down: list[list[int]], up: list[list[int]], middle: int) -> dict[str, Any]:
    """Transformer blocks of each level going down, and going up where those are not the same in reverse."""
    if any(any(depths) and not all(depths) for depths in (*down, *up)):
        raise ModelError(
            "its UNet has attention behind some layers of a level only, which is not supported",
            key="base.layout",
        )

    def in_short(levels: list[list[int]]) -> list[Any]:
        return [depths[0] or 1 if len(set(depths)) == 1 else depths for depths in levels]

    going_down, going_up = in_short(down), in_short(up)
    # The middle block takes the last level's setting, which that level does not use without attention.
    if middle and not any(down[-1]):
        going_down[-1] = middle
    if middle and not any(up[0]):
        going_up[0] = middle
    if going_up == going_down[::-1] and not any(isinstance(level, list) for level in going_down):
        same = len(set(going_down)) == 1
        return {"transformer_layers_per_block": going_down[0] if same else going_down}
    return {"transformer_layers_per_block": going_down, "reverse_transformer_layers_per_block": going_up}


def _check_groups(widths: list[int], kind: str) -> None:
    if wrong := [width for width in widths if width % NUM_GROUPS]:
        raise ModelError(
            f"its {kind} has {wrong[0]} channels, not a multiple of the {NUM_GROUPS} groups of its "
            "normalizations; use a diffusers folder, which has a configuration",
            key="base.groups",
        )
