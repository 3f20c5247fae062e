"""How module names are spelled in LoRA files: dotted (diffusers, PEFT, ComfyUI), with underscores (kohya)."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Literal

from sdlora.errors import AdapterError, shorten
from sdlora.lora.layers import LAYERS_PER_BLOCK, TEXT_ENCODERS, with_text_model

# Names of the original code (input, middle and output blocks), which kohya's SDXL files have. With L layers
# a block, diffusers' `down_blocks.i` are the input blocks 1 + i (L + 1) to (i + 1) (L + 1), the last of them
# the downsampler; `up_blocks.i` are the output blocks i (L + 1) to i (L + 1) + L, the last of them with the
# upsampler, for any number of blocks. L is 2 in every Stable Diffusion, and in files that do not note it.
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


Dialect = Literal["diffusers", "kohya"]
SUFFIXES: dict[Dialect, dict[str, str]] = {
    "diffusers": {"down": "lora_A.weight", "up": "lora_B.weight", "magnitude": "lora_magnitude_vector"},
    "kohya": {"down": "lora_down.weight", "up": "lora_up.weight", "magnitude": "dora_scale"},
}
"""The ends of tensor names, by field of an adapter kind, in the dialects that are written."""

# Names inside a UNet or CLIP text encoder that contain an underscore themselves; all other
# underscores of a kohya key were dots.
# fmt: off
_COMPOUNDS = frozenset({
    "down_blocks", "up_blocks", "mid_block", "transformer_blocks", "to_q", "to_k", "to_v", "to_out",
    "proj_in", "proj_out", "time_emb_proj", "conv_shortcut", "time_embedding", "add_embedding",
    "encoder_hid_proj", "linear_1", "linear_2", "cond_proj", "conv_in", "conv_out", "text_model", "self_attn",
    "q_proj", "k_proj", "v_proj", "out_proj", "add_k_proj", "add_q_proj", "add_v_proj", "to_add_out",
    "text_projection", "input_blocks", "middle_block", "output_blocks", "in_layers", "out_layers",
    "emb_layers", "skip_connection", "time_embed", "label_emb",
})
# fmt: on
_LONGEST = max(name.count("_") + 1 for name in _COMPOUNDS)
_DIFFUSERS_BLOCKS = ("down_blocks.", "mid_block.", "up_blocks.", *TEXT_ENCODERS)
_WRAPPERS = ("base_model.model.", "module.", "_orig_mod.", "unet.", "diffusion_model.")
_KOHYA_PREFIXES = {
    "lora_unet_": "",
    "lycoris_": "",
    "lora_te_": "text_encoder.",
    "lora_te1_": "text_encoder.",
    "lora_te2_": "text_encoder_2.",
}
_TEXT_PREFIXES = {
    "text_encoders.clip_l.transformer.": "text_encoder.",
    "text_encoders.clip_h.transformer.": "text_encoder.",
    "text_encoders.clip_g.transformer.": "text_encoder_2.",
    "clip_l.": "text_encoder.",
    "clip_g.": "text_encoder_2.",
}
# A text encoder's module in a file that does not say which one: PEFT's folders have a file for each.
_BARE_TEXT = ("text_model.", "encoder.layers.", "text_projection")
_WIDTH_OF_SECOND = 1280
_STABLE_DIFFUSION = re.compile(
    r"(?:(?:down|up)_blocks\.\d+\.(?:resnets|attentions|(?:down|up)samplers)|mid_block\.(?:resnets|attentions))"
    r"\.\d+\..+|conv_(?:in|out)|(?:time|add|class)_embedding(?:\..+)?|encoder_hid_proj(?:\..+)?"
    r"|text_encoder(?:_2)?\.(?:text_model\.(?:encoder\.layers\.\d+|embeddings)\..+|text_projection)"
)
_TRANSFORMER = re.compile(
    r"^(?:transformer\.|lora_transformer_|lora_unet_(?:double|single|joint)_blocks"
    r"|(?:(?:base_model\.model|module|_orig_mod|unet|diffusion_model)\.)*"
    r"(?:transformer\.|(?:double|single|joint)_blocks\.|(?:single_)?transformer_blocks\.).*lora)",
    re.M,
)
_PATTERNS = (
    re.compile(r"(.+)\.(lora_[AB])(?:\.[^.]+)?\.weight"),
    re.compile(r"(.+)\.(lora_down|lora_up)\.weight"),
    re.compile(r"(.+)\.(?:lora|lora_linear_layer)\.(down|up)\.weight"),
    re.compile(r"(.+\.processor\.to_(?:[qkv]|out))_lora\.(down|up)\.weight"),
    re.compile(r"(.+)\.(alpha|dora_scale)"),
    re.compile(r"(.+)\.(lora_magnitude_vector)(?:\.\w+){0,2}"),
)
_PARTS = {
    "lora_A": "down",
    "lora_down": "down",
    "lora_B": "up",
    "lora_up": "up",
    "lora_magnitude_vector": "magnitude",
}
_OTHER_ADAPTERS = {
    ".hada_w": "a LoHa",
    ".lokr_w": "a LoKr",
    ".oft_": "an OFT",
    ".lora_mid": "a Tucker-decomposed LoRA",
    ".lora_B.bias": "a LoRA that also trains biases",
    ".vera_lambda": "a VeRA",
    ".a1.weight": "a GLoRA",
    ".on_input": "an (IA)3",
    ".w_norm": "a LyCORIS file that also trains norm layers",
    ".diff\n": "a file of whole weight differences",
    "bundle_emb.": "a LoRA bundled with textual inversion embeddings",
}
_OTHER_FILES = {
    ("control_model.", "controlnet_"): "is a ControlNet, not a LoRA",
    ("model.diffusion_model.",): "is a base model, not a LoRA (pass it with --base)",
    ("first_stage_model.", "quant_conv.", "encoder.conv_in."): "is a VAE, not a LoRA (set base.vae)",
    ("text_model.",): "is a text encoder, not a LoRA",
    ("emb_params",): "is a textual inversion embedding, not a LoRA",
    ("input_blocks.", "down_blocks."): "is a full UNet, not a LoRA (pass its base with --base)",
}


def module_to_kohya(module: str, *, sdxl: bool = False, layers: int = LAYERS_PER_BLOCK) -> str:
    """`mid_block.attentions.0.proj_in` becomes `lora_unet_mid_block_attentions_0_proj_in`.

    For SDXL, the UNet's blocks have the names of the original code (`lora_unet_middle_block_1_proj_in`), and
    the first text encoder is `te1`. `layers` is the number of layers in each block of an SDXL UNet. Raises an
    AdapterError if the name could not be read back.
    """
    if module.startswith("text_encoder."):
        prefix, name = "lora_te1_" if sdxl else "lora_te_", module.removeprefix("text_encoder.")
    elif module.startswith("text_encoder_2."):
        prefix, name = "lora_te2_", module.removeprefix("text_encoder_2.")
    else:
        prefix, name = "lora_unet_", module_to_sgm(module, layers) if sdxl else module
    key = prefix + name.replace(".", "_")
    if kohya_to_module(key, layers) != module:
        problem = f"the kohya format has no name for module {module}; use --format diffusers"
        raise AdapterError(problem, key="lora.module-name")
    return key


def kohya_to_module(key: str, layers: int = LAYERS_PER_BLOCK) -> str:
    """The reverse of `module_to_kohya`, for both spellings of blocks."""
    prefix = next(filter(key.startswith, _KOHYA_PREFIXES))
    name = ".".join(_join_compounds(key.removeprefix(prefix).split("_")))
    component = _KOHYA_PREFIXES[prefix]
    return component + name if component else sgm_to_module(name, layers)


def _join_compounds(words: Sequence[str]) -> list[str]:
    names: list[str] = []
    start = 0
    while start < len(words):
        lengths = range(min(_LONGEST, len(words) - start), 1, -1)
        length = next((n for n in lengths if "_".join(words[start : start + n]) in _COMPOUNDS), 1)
        names.append("_".join(words[start : start + length]))
        start += length
    return names


def clean_module(name: str) -> str:
    """A module's name without the additions of wrappers (DDP, compile, PEFT)."""
    while wrapper := next((prefix for prefix in _WRAPPERS if name.startswith(prefix)), ""):
        name = name.removeprefix(wrapper)
    return ".".join(part for part in name.split(".") if part not in ("_orig_mod", "base_layer"))


def split_key(key: str, layers: int = LAYERS_PER_BLOCK) -> tuple[str, str] | None:
    """Module and part (`down`, `alpha` ...) of a tensor in any dialect; None if it is not a LoRA's."""
    for pattern in _PATTERNS:
        if match := pattern.fullmatch(key):
            return _read_name(match[1], layers), _PARTS.get(match[2], match[2])
    return None


def _read_name(name: str, layers: int) -> str:
    """The module of a key without its part."""
    if is_kohya_key(name):
        return kohya_to_module(name, layers)
    for prefix, component in _TEXT_PREFIXES.items():
        if name.startswith(prefix):
            return with_text_model(component + name.removeprefix(prefix))
    name = re.sub(r"(\.attn[12])\.processor(\.to_(?:[qkv]|out))$", r"\1\2", clean_module(name))
    name = re.sub(r"(\.attn[12]\.to_out)$", r"\1.0", name)
    return with_text_model(name if name.startswith(_DIFFUSERS_BLOCKS) else sgm_to_module(name, layers))


def with_component(module: str, sizes: Collection[int]) -> str:
    """The module of a text encoder that is not named, by the sizes of its tensors; others are unchanged."""
    if not module.startswith(_BARE_TEXT):
        return module
    return with_text_model(f"{TEXT_ENCODERS[_WIDTH_OF_SECOND in sizes]}{module}")


def is_stable_diffusion(module: str) -> bool:
    """Whether a Stable Diffusion can have the module; no loader finds another."""
    return _STABLE_DIFFUSION.fullmatch(module) is not None


def has_sgm_names(keys: Iterable[str]) -> bool:
    """Whether a kohya file has SDXL's block names."""
    names = (key.split(".")[0].removeprefix("lora_unet_") for key in keys if key.startswith("lora_unet_"))
    return any(is_sgm(".".join(_join_compounds(name.split("_")))) for name in names)


def is_kohya_key(key: str) -> bool:
    return key.startswith(tuple(_KOHYA_PREFIXES))


def dialect_of(keys: Iterable[str]) -> str:
    """The dialect of a file: `kohya`, `lycoris`, `comfyui`, `peft`, `diffusers`, or `diffusers (old)`.

    Raises an AdapterError if the keys are not those of a LoRA; it completes "FILE ...".
    """
    names = list(keys)
    joined = "".join(f"{name}\n" for name in names)
    for mark, kind in _OTHER_ADAPTERS.items():
        if mark in joined:
            problem = f"is {kind}; sdlora supports LoRA and DoRA files only"
            raise AdapterError(problem, key="lora.other-kind")
    if _TRANSFORMER.search(joined):
        problem = "is a LoRA for a transformer such as Flux or SD 3; sdlora supports SD 1.x, 2.x and SDXL"
        raise AdapterError(problem, key="lora.transformer")
    if re.search("motion_modules|temporal_transformer", joined):
        problem = "is a motion LoRA for AnimateDiff; sdlora supports LoRAs of images, SD 1.x, 2.x and SDXL"
        raise AdapterError(problem, key="lora.motion")
    if strange := [name for name in names if name.startswith("lora_") and not is_kohya_key(name)]:
        raise AdapterError(
            f"has keys of an unknown dialect, such as {strange[0]}; kohya keys for SD 1.x, 2.x and SDXL "
            "start with lora_unet_, lora_te_, lora_te1_ or lora_te2_",
            key="lora.dialect",
        )
    if any(name.startswith("lycoris_") for name in names):
        return "lycoris"
    if any(is_kohya_key(name) for name in names):
        return "kohya"
    if re.search(r"^(diffusion_model\.|text_encoders\.).*lora", joined, re.M):
        return "comfyui"
    if re.search(r"\.lora_[AB]\.", joined):
        return "peft" if re.search(r"^base_model\.|\.lora_[AB]\.(?!weight)", joined, re.M) else "diffusers"
    if re.search(r"lora.*\.(down|up)\.weight|\.lora_(down|up)\.", joined):
        return "diffusers (old)"
    raise AdapterError(f"{_other_kind(names)}; use a LoRA .safetensors file", key="lora.not-a-lora")


def _other_kind(names: Sequence[str]) -> str:
    if names and all(name.endswith((".down", ".up")) for name in names):
        return "is part of a checkpoint, for `sdlora resume` only; use a LoRA in the run's adapters/ folder"
    for prefixes, kind in _OTHER_FILES.items():
        if any(name.startswith(prefixes) for name in names):
            return kind
    shown = ", ".join(sorted(names)[:3])
    return f"is not a LoRA (its tensors are {shown} ...)" if names else "has no tensors"
