"""How module names are spelled in LoRA files: dotted (diffusers, PEFT) and with underscores (kohya)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Literal

from sdlora.errors import AdapterError

Dialect = Literal["diffusers", "kohya"]
Part = Literal["down", "up", "alpha"]

TEXT_ENCODERS = ("text_encoder.", "text_encoder_2.")

# Names inside a UNet or CLIP text encoder that contain an underscore themselves; all other
# underscores of a kohya key were dots.
# fmt: off
_COMPOUNDS = frozenset({
    "down_blocks", "up_blocks", "mid_block", "transformer_blocks", "to_q", "to_k", "to_v", "to_out",
    "proj_in", "proj_out", "time_emb_proj", "conv_shortcut", "time_embedding", "add_embedding",
    "encoder_hid_proj", "linear_1", "linear_2", "cond_proj", "conv_in", "conv_out", "text_model", "self_attn",
    "q_proj", "k_proj", "v_proj", "out_proj", "add_k_proj", "add_q_proj", "add_v_proj", "to_add_out",
    "text_projection",
})
# fmt: on
_LONGEST = max(name.count("_") + 1 for name in _COMPOUNDS)
_WRAPPERS = ("base_model.model.", "module.", "_orig_mod.", "unet.")
_PATTERNS: tuple[tuple[re.Pattern[str], dict[str, Part]], ...] = (
    (re.compile(r"(.+)\.(lora_[AB])(?:\.[^.]+)?\.weight"), {"lora_A": "down", "lora_B": "up"}),
    (re.compile(r"(.+)\.(lora_down|lora_up)\.weight"), {"lora_down": "down", "lora_up": "up"}),
    (re.compile(r"(.+)\.(?:lora|lora_linear_layer)\.(down|up)\.weight"), {"down": "down", "up": "up"}),
    (re.compile(r"(.+\.processor\.to_(?:[qkv]|out)_lora)\.(down|up)\.weight"), {"down": "down", "up": "up"}),
    (re.compile(r"(.+)\.(alpha)"), {"alpha": "alpha"}),
)
_SGM = ("lora_unet_input_blocks_", "lora_unet_middle_block_", "lora_unet_output_blocks_")


def module_to_kohya(module: str, modules: Iterable[str] = ()) -> str:
    """`mid_block.attentions.0.proj_in` becomes `lora_unet_mid_block_attentions_0_proj_in`.

    Args:
        module: A clean module name.
        modules: All names of the file: with a second text encoder, the first is called `te1`.

    Raises:
        AdapterError: If the name could not be read back.
    """
    first = "lora_te1_" if any(name.startswith("text_encoder_2.") for name in modules) else "lora_te_"
    prefix, rest = "lora_unet_", module
    if module.startswith("text_encoder."):
        prefix, rest = first, module.removeprefix("text_encoder.")
    elif module.startswith("text_encoder_2."):
        prefix, rest = "lora_te2_", module.removeprefix("text_encoder_2.")
    key = prefix + rest.replace(".", "_")
    if kohya_to_module(key) != module:
        raise AdapterError(
            f"module {module} has a name that the kohya format cannot give back; "
            "export it with --format diffusers"
        )
    return key


def kohya_to_module(key: str) -> str:
    """The reverse of `module_to_kohya`.

    Raises:
        AdapterError: If the key has the block names of the original SDXL code; completes "FILE ...".
    """
    if key.startswith(_SGM):
        raise AdapterError(f"is an SDXL LoRA (module {key}); this version reads LoRAs for SD 1.x and 2.x")
    for prefix, component in (
        ("lora_unet_", ""),
        ("lora_te_", "text_encoder."),
        ("lora_te1_", "text_encoder."),
        ("lora_te2_", "text_encoder_2."),
    ):
        if key.startswith(prefix):
            return component + ".".join(_join_compounds(key.removeprefix(prefix).split("_")))
    raise AdapterError(f"holds {key}, which is no kohya key; one starts with lora_unet_ or lora_te_")


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
    """A module's name without what wrappers (DDP, compile, PEFT) put before and into it."""
    stripped = name
    while stripped.startswith(_WRAPPERS):
        stripped = stripped.removeprefix(next(prefix for prefix in _WRAPPERS if stripped.startswith(prefix)))
    return ".".join(part for part in stripped.split(".") if part not in ("_orig_mod", "base_layer"))


def split_key(key: str) -> tuple[str, Part] | None:
    """The module and the part that a tensor is, for any dialect; None if it is no part of a LoRA."""
    for pattern, parts in _PATTERNS:
        match = pattern.fullmatch(key)
        if match:
            name = match[1]
            if is_kohya_key(name):
                return kohya_to_module(name), parts[match[2]]
            name = re.sub(r"\.processor\.(to_(?:[qkv]|out))_lora$", r".\1", name)
            name = re.sub(r"(\.attn[12]\.to_out)$", r"\1.0", name)
            return with_text_model(clean_module(name)), parts[match[2]]
    return None


def module_name(component: str, path: str) -> str:
    """The adapter's name of a component's module: plain in the UNet, else with the component before it."""
    return path if component == "unet" else with_text_model(f"{component}.{path}")


def with_text_model(name: str) -> str:
    """A text encoder's module with the level `text_model`: newer transformers leave it out, files have it."""
    for component in TEXT_ENCODERS:
        if name.startswith(f"{component}encoder."):
            return f"{component}text_model.{name.removeprefix(component)}"
    return name


def is_kohya_key(key: str) -> bool:
    """Whether a key is spelled with underscores."""
    return key.startswith(("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_"))


def dialect_of(keys: Iterable[str]) -> str:
    """How a file is spelled: `kohya`, `diffusers`, `peft`, `diffusers (old)`, or what it is if it is no LoRA.

    Raises:
        AdapterError: If the keys are those of something else; the message completes "FILE ...".
    """
    names = list(keys)
    joined = "\n".join(names)
    for mark, kind in (
        (".hada_w", "a LoHa"),
        (".lokr_w", "a LoKr"),
        (".oft_", "an OFT"),
        (".dora_scale", "a DoRA"),
        (".lora_magnitude_vector", "a DoRA"),
        (".lora_mid", "a Tucker-decomposed LoRA"),
    ):
        if mark in joined:
            raise AdapterError(f"is {kind}; sdlora reads plain LoRA files only, so train or export it as one")
    if any(is_kohya_key(name) for name in names):
        return "kohya"
    if re.search(r"\.lora_[AB]\.", joined):
        return "peft" if re.search(r"^base_model\.|\.lora_[AB]\.(?!weight)", joined, re.M) else "diffusers"
    if re.search(r"lora.*\.(down|up)\.weight|\.lora_(down|up)\.", joined):
        return "diffusers (old)"
    raise AdapterError(f"{_other_kind(names)}; give a LoRA .safetensors file")


def _other_kind(names: Sequence[str]) -> str:
    """What a file of weights is that is no LoRA."""
    for prefix, kind in (
        ("control_model.", "is a ControlNet, not a LoRA"),
        ("controlnet_", "is a ControlNet, not a LoRA"),
        ("model.diffusion_model.", "is a whole checkpoint, not a LoRA (it belongs to --base)"),
        ("first_stage_model.", "is a VAE, not a LoRA (it belongs to base.vae)"),
        ("quant_conv.", "is a VAE, not a LoRA (it belongs to base.vae)"),
        ("encoder.conv_in.", "is a VAE, not a LoRA (it belongs to base.vae)"),
        ("text_model.", "is a text encoder, not a LoRA"),
        ("emb_params", "is a textual inversion embedding, not a LoRA"),
        ("down_blocks.", "is a whole UNet, not a LoRA (its base belongs to --base)"),
    ):
        if any(name.startswith(prefix) for name in names):
            return kind
    shown = ", ".join(sorted(names)[:3])
    return f"holds no LoRA (its tensors are {shown} ...)" if names else "holds no tensors at all"
