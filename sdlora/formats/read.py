"""Adapters from the tensors of a LoRA file of any dialect.

Diffusers (today's and the old spellings), PEFT, kohya (also with SDXL's block names), LyCORIS' plain LoRA
and ComfyUI. Messages of errors complete "FILE ...".
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
from sdlora.formats.keys import (
    dialect_of,
    has_sgm_names,
    is_stable_diffusion,
    layers_per_block,
    split_key,
    with_component,
)
from sdlora.lora.adapter import KINDS, Adapter
from sdlora.lora.kinds import AdapterModule
from sdlora.lora.layers import LAYERS_PER_BLOCK, TEXT_ENCODERS, component_of
from sdlora.reading import UnfitFileError, parse_json

# Inputs of attn2.to_k: the width of the family's text states.
_FAMILY_OF_WIDTH = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
# How `ss_base_model_version` and `modelspec.architecture` begin.
_FAMILY_OF_START = {
    "sd_v1": "sd1",
    "sd_v2": "sd2",
    "sdxl_": "sdxl",
    "stable-diffusion-v1": "sd1",
    "stable-diffusion-v2": "sd2",
    "stable-diffusion-xl": "sdxl",
}
_KEPT = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_PLAIN = re.compile(r"\^?(?:[\w-]|\\?\.)+\$?")
# Initialisations that change the base, so that the file is right only on that changed base.
_BASE_CHANGING = ("pissa", "loftq", "olora", "corda", "lora_ga")
_COPY_AGAIN = "download or copy it again"


def state_to_adapter(
    state: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = torch.float32,
) -> Adapter:
    """Reads the tensors of a LoRA file, and folds the scale into `up` where alpha is not the rank.

    Without a dtype the tensors stay as they are; only folded ones and those in 8 bits become fp32. Raises an
    AdapterError if the tensors are not those of a LoRA, or modules are incomplete.
    """
    notes = dict(metadata or {})
    dialect = dialect_of(state)
    stored, alphas = read_modules(state, notes)
    modules = {name: _fold(module, alphas[name], dtype) for name, module in sorted(stored.items())}
    if dialect == "kohya":
        for name, rank in _read_note(notes, "sdlora.ranks").items():
            if name in modules and isinstance(rank, int):
                modules[name] = modules[name].unpad(rank)
    rank = max(module.rank for module in modules.values())
    trained = {alpha for alpha in alphas.values() if alpha is not None}
    if len(trained) == 1 and trained != {float(rank)}:
        notes.setdefault("sdlora.trained_alpha", f"{trained.pop():g}")
    family = guess_family(stored, notes, state)
    if family and "sdlora.family" not in notes:
        # Stock diffusers takes these factors only in the shape of its layer.
        for name in (name for name in modules if name.endswith((".proj_in", ".proj_out"))):
            modules[name] = modules[name].with_kernel(family == "sd1")
    return Adapter(modules, rank, float(rank), family, notes.get("sdlora.parent"), notes)


def _fold(module: AdapterModule, alpha: float | None, dtype: torch.dtype | None) -> AdapterModule:
    """A module in a dtype, at scale 1; without a dtype, whole numbers and 8 bits become fp32."""

    def convert(tensor: Tensor) -> Tensor:
        return tensor.to(dtype or (tensor.dtype if tensor.dtype in _KEPT else torch.float32)).contiguous()

    module = module.map(convert)
    if alpha is None or alpha == module.rank:
        return module
    return module.fold(alpha / module.rank).map(convert)


def read_modules(
    state: Mapping[str, Tensor], notes: Mapping[str, str]
) -> tuple[dict[str, AdapterModule], dict[str, float | None]]:
    """The modules of a LoRA file as stored, and their alphas; None means the rank.

    Raises an AdapterError if a tensor does not belong to a LoRA, a module occurs twice, is incomplete, or has
    tensors that do not fit together; or if the metadata is damaged, or not that of a LoRA.
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
            raise AdapterError(f"has {split[0]} twice, the second time as {key}", key="lora.duplicate-module")
        else:
            parts[split[0]][split[1]] = tensor
    if foreign:
        problem = f"has unknown tensors, {len(foreign)} of {len(state)}: {join_names(foreign, 3)}"
        raise AdapterError(f"{problem}; export it as a plain LoRA", key="lora.unknown-tensors")
    parts = {
        with_component(name, [size for tensor in found.values() for size in tensor.shape]): found
        for name, found in parts.items()
    }
    if strange := [name for name in parts if not is_stable_diffusion(name)]:
        problem = f"has modules of another network, {len(strange)} of {len(parts)}: {join_names(strange, 3)}"
        raise AdapterError(
            f"{problem}; sdlora supports LoRAs for SD 1.x, 2.x and SDXL", key="lora.other-network"
        )
    stored_alphas = {name: found.pop("alpha", None) for name, found in parts.items()}
    modules: dict[str, AdapterModule] = {}
    incomplete, unfit = [], []
    for name, found in parts.items():
        kind = next((kind for kind in KINDS.values() if found.keys() in kind.file_parts), None)
        if module := kind.from_file(found) if kind else None:
            modules[name] = module
        elif kind:
            shapes = " and ".join(f"{part} {tuple(tensor.shape)}" for part, tensor in found.items())
            unfit.append(f"{name} has {shapes}")
        else:
            incomplete.append(name)
    if incomplete:
        problem = f"has incomplete modules, {len(incomplete)} of {len(parts)}: {join_names(incomplete, 3)}"
        raise AdapterError(f"{problem}; {_COPY_AGAIN}", key="lora.incomplete-modules")
    if unfit:
        problem = f"has tensors of incompatible shapes: {unfit[0]}; {_COPY_AGAIN}"
        raise AdapterError(problem, key="lora.shapes")
    settings = {component: _peft_settings(notes, component) for component in ("unet.", *TEXT_ENCODERS)}
    alphas = {
        name: _read_alpha(name, module, stored_alphas[name], settings[f"{component_of(name)}."])
        for name, module in modules.items()
    }
    return modules, alphas


def guess_family(modules: Mapping[str, AdapterModule], notes: Mapping[str, str], keys: Iterable[str]) -> str:
    """The family from the metadata, else from names and the width of the cross-attention, else empty.

    Raises an AdapterError if a file for another family has SDXL's block names, which no tool would load.
    """
    marks = (notes.get("ss_base_model_version", ""), notes.get("modelspec.architecture", ""))
    starts = (
        family for mark in marks for start, family in _FAMILY_OF_START.items() if mark.startswith(start)
    )
    widths = {module.features[0] for name, module in modules.items() if name.endswith("attn2.to_k")}
    keys = list(keys)
    is_sdxl = has_sgm_names(keys)
    # kohya numbers the first text encoder in files for SDXL only.
    is_numbered = any(key.startswith("lora_te1_") for key in keys)
    has_second = any(name.startswith("text_encoder_2.") for name in modules)
    family: str = (
        notes.get("sdlora.family")
        or next(starts, None)
        or (_FAMILY_OF_WIDTH.get(widths.pop()) if len(widths) == 1 else None)
        or ("sdxl" if is_sdxl or is_numbered or has_second else "")
    )
    if is_sdxl and family != "sdxl":
        raise AdapterError(
            f"is for family {family} but has the block names of SDXL (lora_unet_input_blocks_...), which "
            "no tool reads for that family; export it again from its trainer",
            key="lora.family",
        )
    return family


def _read_alpha(
    name: str, module: AdapterModule, stored: Tensor | None, settings: Mapping[str, Any]
) -> float | None:
    """A module's alpha, from its tensor or from PEFT's configuration; None means its rank."""
    if settings.get("use_dora") and not module.peft_settings.get("use_dora"):
        problem = f"is a DoRA without the magnitudes of {name}; {_COPY_AGAIN}"
        raise AdapterError(problem, key="lora.incomplete-modules")
    if stored is not None:
        if stored.numel() != 1 or not math.isfinite(float(stored)):
            raise AdapterError(
                f"has an alpha of {name} that is not a number; {_COPY_AGAIN}", key="lora.alpha"
            )
        return float(stored)
    if "lora_alpha" not in settings:
        return None
    path = name.removeprefix(f"{component_of(name)}.")
    fits = (value for pattern, value in settings["alpha_pattern"].items() if _names(pattern, path))
    alpha = next(fits, settings["lora_alpha"])
    is_number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
    if not is_number or not abs(alpha) <= sys.float_info.max:
        problem = f"has a lora_alpha of {shorten(repr(alpha))}, which is not a number"
        raise AdapterError(problem, key="lora.alpha")
    return float(alpha) * math.sqrt(module.rank) if settings.get("use_rslora") else float(alpha)


def _peft_settings(notes: Mapping[str, str], component: str) -> dict[str, Any]:
    """PEFT's configuration for one component; empty where the file has none."""
    config = _read_note(notes, "lora_adapter_metadata")
    own = {key.removeprefix(component): value for key, value in config.items() if key.startswith(component)}
    own = own or {key: value for key, value in config.items() if "." not in key}
    kind = str(own.get("peft_type") or "LORA")
    if kind != "LORA":
        problem = f"is a {kind}; sdlora supports LoRA and DoRA files only"
        raise AdapterError(problem, key="lora.other-kind")
    start = str(own.get("init_lora_weights") or "").lower()
    if start.startswith(_BASE_CHANGING):
        raise AdapterError(
            f"was initialized with {start}, which also changes the base weights; convert it to a plain "
            "LoRA with PEFT's path_initial_model_for_weight_conversion",
            key="lora.changes-base",
        )
    patterns = own.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        problem = "has an alpha_pattern that is not a table; export the LoRA again"
        raise AdapterError(problem, key="lora.metadata")
    return {**own, "alpha_pattern": patterns}


def _read_note(notes: Mapping[str, str], key: str) -> dict[str, Any]:
    """A JSON object in a file's metadata; empty where there is none."""
    try:
        value = parse_json(notes.get(key) or "{}")
    except UnfitFileError as error:
        raise AdapterError(f"has {key} that {error}; export the LoRA again", key="lora.metadata") from None
    if not isinstance(value, dict):
        problem = f"has {key} that is not a JSON object; export the LoRA again"
        raise AdapterError(problem, key="lora.metadata")
    return value


def _names(pattern: str, module: str) -> bool:
    """Whether a key of PEFT's alpha_pattern, a module's name or the end of one, names a module.

    For PEFT it is a regular expression. A file's expression is never run: some take years.
    """
    if not _PLAIN.fullmatch(pattern):
        raise AdapterError(
            f"has an alpha_pattern with a regular expression, {shorten(pattern)}; only names are supported",
            key="lora.metadata",
        )
    name = pattern.replace("\\.", ".").removeprefix("^").removesuffix("$")
    return module == name or (not pattern.startswith("^") and module.endswith(f".{name}"))
