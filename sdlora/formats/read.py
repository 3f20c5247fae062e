"""Adapters from the tensors of a LoRA file of any dialect.

Diffusers (today's and the old spellings), PEFT, kohya (also with SDXL's block names), LyCORIS' plain LoRA
and ComfyUI.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from sdlora.errors import AdapterError, join_names, shorten
from sdlora.formats.keys import dialect_of, has_sgm_names, split_key
from sdlora.formats.sgm_keys import layers_per_block
from sdlora.lora.adapter import KINDS, Adapter
from sdlora.lora.kinds import AdapterModule
from sdlora.lora.layers import LAYERS_PER_BLOCK, TEXT_ENCODERS, component_of
from sdlora.reading import UnfitFileError, parse_json

# Inputs of attn2.to_k: the width of the family's text states.
_FAMILY_OF_WIDTH = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
# How `ss_base_model_version` and `modelspec.architecture` begin.
_FAMILY_OF_KOHYA = {"sd_v1": "sd1", "sd_v2": "sd2", "sdxl_": "sdxl"}
_FAMILY_OF_ARCHITECTURE = {
    "stable-diffusion-v1": "sd1",
    "stable-diffusion-v2": "sd2",
    "stable-diffusion-xl": "sdxl",
}
# Initialisations that change the base, so that the file is right only on that changed base.
_KEPT = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_PLAIN = re.compile(r"\^?(?:[\w-]|\\?\.)+\$?")
_BASE_CHANGING = ("pissa", "loftq", "olora", "corda", "lora_ga")


def state_to_adapter(
    state: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = torch.float32,
) -> Adapter:
    """Reads the tensors of a LoRA file; they need no gradient.

    Where alpha is not the rank the scale is folded into `up`.

    Args:
        state: Tensors by key.
        metadata: Of the file.
        dtype: None leaves the tensors as they are, but for those that are folded or in 8 bits: they become
            fp32.

    Raises:
        AdapterError: If these are no plain LoRA's tensors, or pairs are incomplete; completes "FILE ...".
    """
    notes = dict(metadata or {})
    dialect = dialect_of(state)
    parts = split_state(state, notes)
    alphas = module_alphas(parts, notes)
    ranks = _read_note(notes, "sdlora.ranks") if dialect == "kohya" else {}
    modules = {name: _read_module(found, alphas[name], dtype) for name, found in sorted(parts.items())}
    modules |= {
        name: modules[name].unpad(rank)
        for name, rank in ranks.items()
        if name in modules and isinstance(rank, int)
    }
    rank = max(module.rank for module in modules.values())
    trained = {alpha for alpha in alphas.values() if alpha is not None}
    if len(trained) == 1 and trained != {float(rank)}:
        notes.setdefault("sdlora.trained_alpha", f"{trained.pop():g}")
    family = guess_family(parts, notes, state)
    return Adapter(modules, rank, float(rank), family, notes.get("sdlora.parent"), notes)


def split_state(state: Mapping[str, Tensor], notes: Mapping[str, str]) -> dict[str, dict[str, Tensor]]:
    """The tensors of a LoRA file by module and part (`down`, `up`, perhaps `alpha`).

    Raises:
        AdapterError: If a tensor does not belong to a LoRA, a module occurs twice, or a pair is incomplete or
            does not fit together; completes "FILE ...".
    """
    layers = LAYERS_PER_BLOCK
    if "sdlora.layers_per_block" in notes:
        # Where they differ, a file has diffusers' names, which need no number.
        with suppress(AdapterError):
            layers = layers_per_block(notes)
    parts: dict[str, dict[str, Tensor]] = {}
    foreign: list[str] = []
    for key, tensor in state.items():
        split = split_key(key, layers)
        if split is None:
            foreign.append(key)
        elif split[1] in parts.setdefault(split[0], {}):
            raise AdapterError(f"has {split[0]} twice, the second time as {key}")
        else:
            parts[split[0]][split[1]] = tensor
    if foreign:
        raise AdapterError(
            f"has unknown tensors, {len(foreign)} of {len(state)}: "
            f"{join_names(foreign, 3)}; export it as a plain LoRA"
        )
    incomplete = [name for name, found in parts.items() if kind_of(found) is None]
    if incomplete:
        raise AdapterError(
            f"has incomplete modules, {len(incomplete)} of {len(parts)}: "
            f"{join_names(incomplete, 3)}; download or copy it again"
        )
    for name, found in parts.items():
        _check_module(name, found)
    return parts


def _check_module(name: str, found: Mapping[str, Tensor]) -> None:
    """Refuses factors that cannot be multiplied, and an alpha that is not a number."""
    kind = kind_of(found)
    if kind is None or not kind.fits(found):
        shapes = " and ".join(f"{part} {tuple(found[part].shape)}" for part in found if part != "alpha")
        raise AdapterError(
            f"has tensors of incompatible shapes: {name} has {shapes}; download or copy it again"
        )
    alpha = found.get("alpha")
    if alpha is not None and not (alpha.numel() == 1 and math.isfinite(float(alpha))):
        raise AdapterError(f"has an alpha of {name} that is not a number; download or copy it again")


def guess_family(
    parts: Mapping[str, Mapping[str, Tensor]], notes: Mapping[str, str], keys: Iterable[str]
) -> str:
    """The family from the metadata, else from names and the width of the cross-attention, else empty.

    Raises:
        AdapterError: If a file for another family has SDXL's block names, which no tool would load.
    """
    version, architecture = notes.get("ss_base_model_version", ""), notes.get("modelspec.architecture", "")
    widths = {int(found["down"].shape[1]) for name, found in parts.items() if name.endswith("attn2.to_k")}
    is_sdxl = has_sgm_names(keys)
    family: str = (
        notes.get("sdlora.family")
        or _by_start(_FAMILY_OF_KOHYA, version)
        or _by_start(_FAMILY_OF_ARCHITECTURE, architecture)
        or (_FAMILY_OF_WIDTH.get(widths.pop()) if len(widths) == 1 else None)
        or ("sdxl" if is_sdxl or any(name.startswith("text_encoder_2.") for name in parts) else "")
    )
    if is_sdxl and family != "sdxl":
        raise AdapterError(
            f"is for family {family} but has the block names of SDXL (lora_unet_input_blocks_...), which "
            "no tool reads for that family; export it again from its trainer"
        )
    return family


def _by_start(table: Mapping[str, str], text: str) -> str | None:
    return next((value for start, value in table.items() if text.startswith(start)), None)


def _read_module(
    found: Mapping[str, Tensor], alpha: float | None, dtype: torch.dtype | None
) -> AdapterModule:
    """One module, its scale folded in."""
    kind = kind_of(found)
    assert kind is not None
    parts = {part: _as_float(tensor, dtype).contiguous() for part, tensor in found.items() if part != "alpha"}
    module = kind.from_file(parts)
    if alpha is None or alpha == module.rank:
        return module
    folded = module.fold(alpha / module.rank)
    return folded.map(lambda tensor: tensor.to(dtype).contiguous()) if dtype else folded


def kind_of(found: Mapping[str, Tensor]) -> type[AdapterModule] | None:
    """The adapter kind that has these tensors; None if some are missing."""
    parts = {*found} - {"alpha"}
    return next((kind for kind in KINDS.values() if parts in kind.file_parts()), None)


def _as_float(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """In a dtype, or as it is; whole numbers and 8 bits become fp32, since few operations know them."""
    return tensor.to(dtype or (tensor.dtype if tensor.dtype in _KEPT else torch.float32))


def module_alphas(
    parts: Mapping[str, Mapping[str, Tensor]], notes: Mapping[str, str]
) -> dict[str, float | None]:
    """Each module's alpha, from its tensor or from PEFT's configuration; None means its rank.

    Raises:
        AdapterError: If the configuration is damaged, or not that of a plain LoRA; completes "FILE ...".
    """
    settings = {component: _settings(notes, component) for component in ("unet.", *TEXT_ENCODERS)}
    alphas: dict[str, float | None] = {}
    for name, found in parts.items():
        component = f"{component_of(name)}."
        own = settings[component]
        kind = kind_of(found)
        if own.get("use_dora") and kind and not kind.peft_settings.get("use_dora"):
            raise AdapterError(f"is a DoRA without the magnitudes of {name}; download or copy it again")
        if "alpha" in found:
            alphas[name] = float(found["alpha"])
        elif "lora_alpha" in own:
            module = name.removeprefix(component)
            fits = (value for key, value in own["alpha_pattern"].items() if _names(key, module))
            alpha = _number(next(fits, own["lora_alpha"]))
            rank = int(found["down"].shape[0])
            alphas[name] = alpha * math.sqrt(rank) if own.get("use_rslora") else alpha
        else:
            alphas[name] = None
    return alphas


def _settings(notes: Mapping[str, str], component: str) -> dict[str, Any]:
    """PEFT's configuration for one component; empty where the file has none."""
    config = _read_note(notes, "lora_adapter_metadata")
    own = {key.removeprefix(component): value for key, value in config.items() if key.startswith(component)}
    own = own or {key: value for key, value in config.items() if "." not in key}
    kind = str(own.get("peft_type") or "LORA")
    if kind != "LORA":
        raise AdapterError(f"is a {kind}; sdlora supports LoRA and DoRA files only")
    start = str(own.get("init_lora_weights") or "").lower()
    if start.startswith(_BASE_CHANGING):
        raise AdapterError(
            f"was initialized with {start}, which also changes the base weights; convert it to a plain "
            "LoRA with PEFT's path_initial_model_for_weight_conversion"
        )
    patterns = own.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise AdapterError("has an alpha_pattern that is not a table; export the LoRA again")
    return {**own, "alpha_pattern": patterns}


def _read_note(notes: Mapping[str, str], key: str) -> dict[str, Any]:
    """A JSON object in a file's metadata; empty where there is none."""
    try:
        value = parse_json(notes.get(key) or "{}")
    except UnfitFileError as error:
        raise AdapterError(f"has {key} that {error}; export the LoRA again") from None
    if not isinstance(value, dict):
        raise AdapterError(f"has {key} that is not a JSON object; export the LoRA again")
    return value


def _names(pattern: str, module: str) -> bool:
    """Whether a key of PEFT's alpha_pattern, a module's name or the end of one, names a module.

    PEFT takes it for a regular expression. A file's expression is never run: some take years.
    """
    if not _PLAIN.fullmatch(pattern):
        raise AdapterError(
            f"has an alpha_pattern with a regular expression, {shorten(pattern)}; only plain names are "
            "supported"
        )
    name = pattern.replace("\\.", ".").removeprefix("^").removesuffix("$")
    return module == name or (not pattern.startswith("^") and module.endswith(f".{name}"))


def _number(value: Any) -> float:
    """A finite number from JSON."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not abs(value) <= sys.float_info.max:
        raise AdapterError(f"has a lora_alpha of {shorten(repr(value))}, which is not a number")
    return float(value)
