"""Adapters as the tensors of a file, in the dialects that other programs read. R rank.

Files are always scale-folded: with `alpha == rank`, loaders that use alpha and those that ignore it agree.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from sdlora.dtypes import DTYPES
from sdlora.errors import AdapterError, ConfigError, join_names
from sdlora.formats.keys import SUFFIXES, Dialect, clean_module, layers_per_block, module_to_kohya
from sdlora.lora.adapter import Adapter
from sdlora.lora.kinds import AdapterModule
from sdlora.lora.layers import LAYERS_PER_BLOCK, TEXT_ENCODERS, component_of

Precision = Literal["fp32", "bf16", "fp16"]

# bf16 keeps 8 bits, so two rounded factors are always about 2e-3 off, which its users accept. fp16 is this
# far off only where its smallest numbers run out.
LARGEST_ERROR: dict[Precision, float] = {"fp32": math.inf, "bf16": 1e-2, "fp16": 1e-3}
LARGEST_ZERO_SHARE = 1e-3
MAX_PADDED = 4 * 10**9


@dataclass(frozen=True, slots=True)
class Rounding:
    """The cost of a smaller dtype, at the precision asked, as shares of norm and of elements."""

    asked: Precision
    used: Precision
    relative_error: float
    newly_zero_share: float


def fold(adapter: Adapter) -> Adapter:
    """The same change with the scale inside `up`, so that alpha == rank; the trained alpha is noted."""
    if all(adapter.scale_of(name) == 1 for name in adapter.modules):
        return replace(adapter, alpha=float(adapter.rank), scales={}) if adapter.scales else adapter
    modules = {
        name: module.map(lambda tensor: tensor.detach().float()).fold(adapter.scale_of(name))
        for name, module in adapter.modules.items()
    }
    notes = {"sdlora.trained_alpha": f"{adapter.alpha:g}", **adapter.notes}
    return replace(adapter, modules=modules, alpha=float(adapter.rank), notes=notes, scales={})


def round_adapter(adapter: Adapter, precision: Precision = "fp16") -> tuple[Adapter, Rounding]:
    """Folds and rounds an adapter, or keeps it in fp32 where rounding would lose too much.

    Raises a ConfigError if the precision is unknown.
    """
    if precision not in DTYPES:
        problem = f"precision = {precision!r} must be one of {', '.join(DTYPES)}"
        raise ConfigError(problem, key="precision")
    folded = fold(adapter)
    folded = folded if folded.dtype == torch.float32 else folded.to(dtype=torch.float32)
    modules = {name: module.round(DTYPES[precision]) for name, module in folded.modules.items()}
    rounded = replace(folded, modules=modules)
    error = relative_error(folded, rounded)
    newly_zero = sum(
        int(((exact != 0) & (close == 0)).sum())
        for exact, close in zip(folded.parameters(), rounded.parameters(), strict=True)
    )
    share = newly_zero / max(folded.num_parameters, 1)
    # Written so that NaN counts as too large.
    keeps = error <= LARGEST_ERROR[precision] and share <= LARGEST_ZERO_SHARE
    used: Precision = precision if keeps else "fp32"
    return (rounded if keeps else folded), Rounding(precision, used, error, share)


def relative_error(exact: Adapter, other: Adapter) -> float:
    """Norm of the difference of two changes over the norm of the first, all modules together."""
    one, two = fold(exact), fold(other)
    difference = sum(own.distance_squared(two.modules[name]) for name, own in one.modules.items())
    norm = sum(own.norm_squared() for own in one.modules.values())
    return math.sqrt(difference / norm) if norm > 0 else float(difference > 0)


def adapter_to_diffusers(adapter: Adapter) -> dict[str, Tensor]:
    """`unet.<module>.lora_A.weight` (R, in) and `.lora_B.weight` (out, R)."""
    state: dict[str, Tensor] = {}
    for name, module in _clean_modules(fold(adapter)).items():
        key = name if name.startswith(TEXT_ENCODERS) else f"unet.{name}"
        for part, tensor in module.to_file("diffusers").items():
            state[f"{key}.{SUFFIXES['diffusers'][part]}"] = tensor.detach()
    return state


def adapter_to_kohya(adapter: Adapter) -> dict[str, Tensor]:
    """`lora_unet_<module>.lora_down.weight`, `.lora_up.weight` and `.alpha`.

    For SDXL the UNet's blocks have the names of the original code, as kohya's tools write them. Every
    module is zero-padded to one rank: the only spelling of mixed ranks on which all loaders agree.
    """
    folded = fold(adapter)
    modules = _clean_modules(folded)
    sdxl = folded.family == "sdxl" or any(name.startswith("text_encoder_2.") for name in modules)
    layers = layers_per_block(folded.notes) if sdxl else LAYERS_PER_BLOCK
    rank = max(module.rank for module in modules.values())
    if sum(rank * module.num_parameters // module.rank for module in modules.values()) > MAX_PADDED:
        raise AdapterError(
            f"the kohya format pads all {len(modules)} modules to the largest rank, {rank}, which would "
            "take many gigabytes; use --format diffusers, or resize the LoRA first",
            key="export.formats",
        )
    exact = torch.tensor(rank, dtype=folded.dtype)
    alpha = exact if float(exact) == rank else torch.tensor(float(rank))
    state: dict[str, Tensor] = {}
    for name, module in modules.items():
        key = module_to_kohya(name, sdxl=sdxl, layers=layers)
        for part, tensor in module.pad(rank).to_file("kohya").items():
            state[f"{key}.{SUFFIXES['kohya'][part]}"] = tensor.detach()
        state[f"{key}.alpha"] = alpha.clone()
    return state


def rank_notes(adapter: Adapter, dialect: Dialect) -> dict[str, str]:
    """The metadata that a file needs if its ranks differ.

    In the kohya dialect the true ranks of padded modules, so that reading restores them. In the diffusers
    dialect the smallest configuration that every diffusers reads: newer PEFT writes more fields, which older
    PEFT refuses. All components have it or none.
    """
    modules = _clean_modules(adapter)
    largest = max(module.rank for module in modules.values())
    if dialect == "kohya":
        smaller = {name: one.rank for name, one in sorted(modules.items()) if one.rank < largest}
        return {"sdlora.ranks": json.dumps(smaller)} if smaller else {}
    ranks: dict[str, dict[str, int]] = {}
    for name, module in modules.items():
        component = f"{component_of(name)}."
        # Whether text encoders have the level depends on the version of transformers.
        path = name.removeprefix(component).removeprefix("text_model.")
        ranks.setdefault(component, {})[path] = module.rank
    if all(len(set(own.values())) == 1 for own in ranks.values()):
        return {}
    values: dict[str, Any] = {}
    kind = next(iter(modules.values()))
    for component, own in ranks.items():
        common = Counter(own.values()).most_common(1)[0][0]
        start = "^" if component == "unet." else ""
        others = {f"{start}{name}": rank for name, rank in sorted(own.items()) if rank != common}
        settings = {
            "r": common,
            "lora_alpha": common,
            "rank_pattern": others,
            "alpha_pattern": others,
            "target_modules": sorted(own),
            **kind.peft_settings,
        }
        values |= {f"{component}{name}": value for name, value in settings.items()}
    return {"lora_adapter_metadata": json.dumps(values, sort_keys=True)}


def _clean_modules(adapter: Adapter) -> dict[str, AdapterModule]:
    """Modules by the names that files have, without those of wrappers."""
    modules = {clean_module(name): module for name, module in adapter.modules.items()}
    strange = [name for name in modules if re.search(r"lora_|(^|\.)(default|unet)(\.|$)", name)]
    if strange or len(modules) != len(adapter.modules):
        shown = join_names(strange or adapter.modules, 3)
        problem = f"module names cannot be written to a LoRA file: {shown}; use those of the base"
        raise AdapterError(problem, key="lora.module-name")
    return modules
