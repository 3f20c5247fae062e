"""Block names of the original code (input, middle and output blocks), which kohya's SDXL files have.

With L layers a block, diffusers' `down_blocks.i` are the input blocks 1 + i (L + 1) to (i + 1) (L + 1), the
last of them the downsampler; `up_blocks.i` are the output blocks i (L + 1) to i (L + 1) + L, the last of them
with the upsampler, for any number of blocks. L is 2 in every Stable Diffusion, and in files that do not note
it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from sdlora.errors import AdapterError, shorten
from sdlora.lora.layers import LAYERS_PER_BLOCK

_ENDS = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_ENDS_BACK = {sgm: name for name, sgm in _ENDS.items()}
_RESNET_BACK = {sgm: name for name, sgm in _RESNET.items()}
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)")
_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")
_SGM = re.compile(r"(input_blocks|middle_block|output_blocks)\.(\d+)\.(?:(\d+)\.)?(.+)")


def layers_per_block(notes: Mapping[str, str]) -> int:
    """Layers in each block of an SDXL base, from the notes of a file; else the usual 2.

    Raises an AdapterError if they differ from block to block; the original code has no names for that.
    """
    text = notes.get("sdlora.layers_per_block", str(LAYERS_PER_BLOCK))
    if not re.fullmatch("[0-9]{1,3}", text):
        raise AdapterError(
            f"the kohya format for SDXL has no names for a base with {shorten(text)} layers per block; use "
            "--format diffusers",
            key="lora.layers-per-block",
        )
    return int(text)


def is_sgm(name: str) -> bool:
    """Whether a dotted module name is one of the original code."""
    return name in _ENDS_BACK or _SGM.fullmatch(name) is not None


def module_to_sgm(module: str, layers: int = LAYERS_PER_BLOCK) -> str:
    """`down_blocks.1.attentions.0.proj_in` becomes `input_blocks.4.1.proj_in`.

    An upsampler becomes part 2 of its block, behind resnet and attention, as in SDXL. Raises an AdapterError
    if the original code has no such module.
    """
    if module in _ENDS:
        return _ENDS[module]
    if match := _MIDDLE.fullmatch(module):
        is_attention, number = match[1] == "attentions", int(match[2])
        return f"middle_block.{2 * number + is_attention}.{_RESNET.get(match[3], match[3])}"
    if match := _BLOCK.fullmatch(module):
        side, block, kind, layer, inner = match[1], int(match[2]), match[3], int(match[4]), match[5]
        first = block * (layers + 1)
        if (side, kind, inner) == ("down", "downsamplers", "conv"):
            return f"input_blocks.{first + layers + 1}.0.op"
        if (side, kind, inner) == ("up", "upsamplers", "conv"):
            return f"output_blocks.{first + layers}.2.conv"
        if kind in ("resnets", "attentions") and layer < layers + (side == "up"):
            blocks, number = ("input", 1 + first + layer) if side == "down" else ("output", first + layer)
            own = f"0.{_RESNET.get(inner, inner)}" if kind == "resnets" else f"1.{inner}"
            return f"{blocks}_blocks.{number}.{own}"
    raise AdapterError(
        f"the kohya format for SDXL with {layers} layers per block has no name for module {module}; use "
        "--format diffusers",
        key="lora.module-name",
    )


def sgm_to_module(name: str, layers: int = LAYERS_PER_BLOCK) -> str:
    """The reverse of `module_to_sgm`; other names are returned unchanged."""
    if name in _ENDS_BACK:
        return _ENDS_BACK[name]
    match = _SGM.fullmatch(name)
    if match is None:
        return name
    side, number, part, inner = match[1], int(match[2]), match[3], match[4]
    if side == "middle_block":
        kind = "attentions" if number % 2 else "resnets"
        return f"mid_block.{kind}.{number // 2}.{_RESNET_BACK.get(inner, inner)}"
    if part is None:
        return name
    block, layer = divmod(number - (side == "input_blocks"), layers + 1)
    where = f"{'down' if side == 'input_blocks' else 'up'}_blocks.{block}"
    if (side, layer, part, inner) == ("input_blocks", layers, "0", "op"):
        return f"{where}.downsamplers.0.conv"
    # A block without attention has its upsampler as part 1.
    if side == "output_blocks" and part in "12" and inner == "conv":
        return f"{where}.upsamplers.0.conv"
    if part not in ("0", "1"):
        return name
    kind = "attentions" if part == "1" else "resnets"
    return f"{where}.{kind}.{layer}.{_RESNET_BACK.get(inner, inner)}"
