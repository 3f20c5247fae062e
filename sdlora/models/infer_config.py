"""The configuration of each part of a base, as far as the shapes of its original tensors tell it.

Names are those of the original code (CompVis, Stability AI, OpenAI, OpenCLIP), without the prefix that a part
has in a single file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from sdlora.errors import ModelError

Shapes = Mapping[str, tuple[int, ...]]

# Numbers that no shape holds, the same in every published base: eight heads in SD 1, else 64 channels a head;
# 32 groups in each normalisation; six numbers in SDXL's time ids.
SD1_HEADS, HEAD_WIDTH, NUM_GROUPS, NUM_TIME_IDS = 8, 64, 32, 6

VAE_LAYERS = (
    r"encoder\.down\.(\d+)\.block\.(\d+)\.conv2\.weight",
    r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\.conv2\.weight",
)


def unet_config(shapes: Shapes, pooled: int = 0) -> dict[str, Any]:
    """The configuration of a UNet2DConditionModel, whatever its widths, depths and places of attention.

    Args:
        shapes: Of its tensors, such as `input_blocks.0.0.weight`.
        pooled: Width of the pooled text states, for SDXL.

    Raises:
        ModelError: If it is built in a way that a UNet2DConditionModel has no setting for.
    """
    num_inputs = 1 + max(int(found[1]) for found in _find(shapes, r"input_blocks\.(\d+)\."))
    downs = sorted(int(found[1]) for found in _find(shapes, r"input_blocks\.(\d+)\.0\.op\.weight"))
    per_level = downs[0] if downs else num_inputs
    num_levels, layers = len(downs) + 1, per_level - 1
    starts = [1 + level * per_level for level in range(num_levels)]
    widths = [shapes[f"input_blocks.{start}.0.out_layers.3.weight"][0] for start in starts]
    down = [_depths(shapes, "input_blocks", start, layers) for start in starts]
    up = [_depths(shapes, "output_blocks", level * per_level, per_level) for level in range(num_levels)]
    middle = _depths(shapes, "middle_block", 0, 1)[0]
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
        "mid_block_type": _middle_type(shapes, middle),
        "cross_attention_dim": next(
            (shapes[found[0]][1] for found in _find(shapes, r".*\.attn2\.to_k\.weight")), None
        ),
        "use_linear_projection": is_linear,
        "attention_head_dim": [_heads(width) for width in widths] if is_linear else SD1_HEADS,
        **_transformer_layers(down, up, middle),
    }
    if "label_emb.0.0.weight" in shapes:
        inputs = shapes["label_emb.0.0.weight"][1]
        config["addition_embed_type"] = "text_time"
        config["addition_time_embed_dim"] = (inputs - pooled) // NUM_TIME_IDS
        config["projection_class_embeddings_input_dim"] = inputs
    return config


def vae_config(shapes: Shapes) -> dict[str, Any]:
    """The configuration of an AutoencoderKL, by original or diffusers' names; its scaling is the family's."""
    layers = {
        (int(found[1]), int(found[2])): shapes[found[0]][0]
        for pattern in VAE_LAYERS
        for found in _find(shapes, pattern)
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


def clip_config(shapes: Shapes) -> dict[str, Any]:
    """The configuration of a CLIPTextModel in transformers' names, `text_model.` in front."""
    stem = "text_model.encoder.layers"
    return _text_config(
        shapes["text_model.embeddings.token_embedding.weight"],
        shapes["text_model.embeddings.position_embedding.weight"],
        num_layers=_count(shapes, r"text_model\.encoder\.layers\.(\d+)\."),
        inner=shapes[f"{stem}.0.mlp.fc1.weight"][0],
    )


def open_clip_config(shapes: Shapes, *, drop_last: bool) -> dict[str, Any]:
    """The configuration of an OpenCLIP text encoder as a CLIPTextModel.

    Args:
        shapes: Of its tensors, such as `positional_embedding`.
        drop_last: Leave out the last layer of a whole tower: Stable Diffusion 2 reads the states before it.
    """
    projection = shapes.get("text_projection")
    num_layers = _count(shapes, r"transformer\.resblocks\.(\d+)\.")
    config = _text_config(
        shapes["token_embedding.weight"],
        shapes["positional_embedding"],
        num_layers=num_layers - bool(drop_last and projection),
        inner=shapes["transformer.resblocks.0.mlp.c_fc.weight"][0],
    )
    return config if projection is None or drop_last else {**config, "projection_dim": projection[1]}


def _text_config(
    tokens: tuple[int, ...], positions: tuple[int, ...], *, num_layers: int, inner: int
) -> dict[str, Any]:
    return {
        "vocab_size": tokens[0],
        "hidden_size": tokens[1],
        "max_position_embeddings": positions[0],
        "num_hidden_layers": num_layers,
        "num_attention_heads": _heads(tokens[1]),
        "intermediate_size": inner,
    }


def _find(shapes: Shapes, pattern: str) -> list[re.Match[str]]:
    """The names that begin with a pattern."""
    return [found for name in shapes if (found := re.match(pattern, name))]


def _count(shapes: Shapes, pattern: str) -> int:
    return len({found[1] for found in _find(shapes, pattern)})


def _heads(width: int) -> int:
    return max(1, width // HEAD_WIDTH)


def _depths(shapes: Shapes, blocks: str, start: int, count: int) -> list[int]:
    """How many transformer blocks stand behind each of the residual layers from `start` on."""
    stem = f"{blocks}.{{}}.1" if blocks != "middle_block" else f"{blocks}.1"
    return [
        _count(shapes, rf"{re.escape(stem.format(start + layer))}\.transformer_blocks\.(\d+)\.")
        for layer in range(count)
    ]


def _middle_type(shapes: Shapes, depth: int) -> str | None:
    if depth:
        return "UNetMidBlock2DCrossAttn"
    return "UNetMidBlock2D" if any(name.startswith("middle_block.") for name in shapes) else None


def _transformer_layers(down: list[list[int]], up: list[list[int]], middle: int) -> dict[str, Any]:
    """Transformer blocks of each level, going down and, where that is not the same backwards, going up.

    Raises:
        ModelError: If a level has attention behind some of its layers only.
    """
    for depths in (*down, *up):
        if any(depths) and not all(depths):
            raise ModelError(
                "its UNet has attention behind some layers of a level only, which is not supported"
            )

    def in_short(levels: list[list[int]]) -> list[Any]:
        return [depths[0] or 1 if len(set(depths)) == 1 else depths for depths in levels]

    going_down, going_up = in_short(down), in_short(up)
    # The middle block takes the last level's setting, which that level has no use for without attention.
    if middle and not any(down[-1]):
        going_down[-1] = middle
    if middle and not any(up[0]):
        going_up[0] = middle
    if going_up == going_down[::-1] and not any(isinstance(level, list) for level in going_down):
        same = len(set(going_down)) == 1
        return {"transformer_layers_per_block": going_down[0] if same else going_down}
    return {"transformer_layers_per_block": going_down, "reverse_transformer_layers_per_block": going_up}


def _check_groups(widths: list[int], what: str) -> None:
    wrong = [width for width in widths if width % NUM_GROUPS]
    if wrong:
        raise ModelError(
            f"its {what} has {wrong[0]} channels, which {NUM_GROUPS} normalisation groups do not divide; "
            "give a diffusers folder, whose configuration says how it is built"
        )
