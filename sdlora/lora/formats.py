"""Adapters as the tensors of a file, in the dialects that other programs read and write.

Files are always scale-folded: `alpha == rank`, so that a loader that honours alpha and one that ignores
it agree (R-02). R rank.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from sdlora.errors import AdapterError
from sdlora.lora.adapter import Adapter, LowRank
from sdlora.lora.names import TEXT_ENCODERS, clean_module, dialect_of, module_to_kohya, split_key

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# bf16 keeps 8 bits, so two rounded factors are always some 2e-3 off: who asks for it accepts that, but
# not more. fp16 is only this far off where its smallest numbers run out.
LARGEST_ERROR: dict[Precision, float] = {"fp32": math.inf, "bf16": 1e-2, "fp16": 1e-3}
LARGEST_ZERO_SHARE = 1e-3

# Inputs of attn2.to_k: the width of the family's text states.
_FAMILY_OF_WIDTH = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
_FAMILY_OF_KOHYA = {"sd_v1": "sd1", "sd_v2": "sd2", "sd_v2_v": "sd2", "sdxl_base_v1-0": "sdxl"}


@dataclass(frozen=True, slots=True)
class Rounding:
    """What writing in a smaller dtype costs (R-36)."""

    asked: Precision
    used: Precision
    relative_error: float
    """Of the whole change at the precision asked: norm of the difference over norm."""
    newly_zero_share: float
    """Elements that were not zero and would be, of all elements, at the precision asked."""


def fold(adapter: Adapter) -> Adapter:
    """The same change with the scale inside `up`, so that alpha == rank; the trained alpha is noted."""
    if all(adapter.scale_of(name) == 1 for name in adapter.modules):
        return replace(adapter, alpha=float(adapter.rank), scales={}) if adapter.scales else adapter
    modules = {
        name: LowRank(
            pair.down.detach().float(), (pair.up.detach().double() * adapter.scale_of(name)).float()
        )
        for name, pair in adapter.modules.items()
    }
    notes = {"sdlora.trained_alpha": f"{adapter.alpha:g}", **adapter.notes}
    return replace(adapter, modules=modules, alpha=float(adapter.rank), notes=notes, scales={})


def round_adapter(adapter: Adapter, precision: Precision = "fp16") -> tuple[Adapter, Rounding]:
    """Folds and rounds an adapter, or keeps it in fp32 where rounding would lose too much.

    The limits are a relative error of 1e-3 for fp16 (1e-2 for bf16, which is never better than 2e-3) and
    0.1 % of newly zero elements.
    """
    folded = fold(adapter).to(dtype=torch.float32)
    rounded = folded.to(dtype=DTYPES[precision])
    error = relative_error(folded, rounded)
    newly_zero = sum(
        int(((exact != 0) & (close == 0)).sum())
        for exact, close in zip(folded.parameters(), rounded.parameters(), strict=True)
    )
    share = newly_zero / max(folded.num_parameters, 1)
    # Written so that an error that is no number is too large.
    keeps = error <= LARGEST_ERROR[precision] and share <= LARGEST_ZERO_SHARE
    used: Precision = precision if keeps else "fp32"
    return (rounded if keeps else folded), Rounding(precision, used, error, share)


def relative_error(exact: Adapter, other: Adapter) -> float:
    """Norm of the difference of two changes over the norm of the first, all modules together."""
    one, two = fold(exact), fold(other)
    difference = sum(pair.minus(two.modules[name]).norm_squared() for name, pair in one.modules.items())
    norm = sum(pair.norm_squared() for pair in one.modules.values())
    return math.sqrt(difference / norm) if norm > 0 else float(difference > 0)


def adapter_to_diffusers(adapter: Adapter) -> dict[str, Tensor]:
    """`unet.<module>.lora_A.weight` (R, in) and `.lora_B.weight` (out, R)."""
    state: dict[str, Tensor] = {}
    for name, pair in _clean_modules(fold(adapter)).items():
        key = name if name.startswith(TEXT_ENCODERS) else f"unet.{name}"
        state[f"{key}.lora_A.weight"] = pair.down.detach()
        state[f"{key}.lora_B.weight"] = pair.up.detach()
    return state


def adapter_to_kohya(adapter: Adapter) -> dict[str, Tensor]:
    """`lora_unet_<module>.lora_down.weight`, `.lora_up.weight` and `.alpha`.

    Every module is zero-padded to one rank: the only spelling of mixed ranks on which all loaders agree.
    """
    folded = fold(adapter)
    modules = _clean_modules(folded)
    rank = max(pair.rank for pair in modules.values())
    exact = torch.tensor(rank, dtype=folded.dtype)
    alpha = exact if float(exact) == rank else torch.tensor(float(rank))
    state: dict[str, Tensor] = {}
    for name, pair in modules.items():
        key = module_to_kohya(name, modules)
        state[f"{key}.lora_down.weight"] = _resize(pair.down.detach(), 0, rank)
        state[f"{key}.lora_up.weight"] = _resize(pair.up.detach(), 1, rank)
        state[f"{key}.alpha"] = alpha.clone()
    return state


def mixed_rank_metadata(adapter: Adapter) -> str | None:
    """The smallest `lora_adapter_metadata` that every diffusers reads, needed only where ranks differ.

    Newer PEFT writes more fields, which older PEFT refuses.
    """
    modules = _clean_modules(adapter)
    if len({pair.rank for pair in modules.values()}) == 1:
        return None
    values: dict[str, Any] = {}
    for component in ("unet.", *TEXT_ENCODERS):
        ranks = {
            (name if component == "unet." else name.removeprefix(component)): pair.rank
            for name, pair in modules.items()
            if (name.startswith(component) if component != "unet." else not name.startswith(TEXT_ENCODERS))
        }
        if ranks:
            common = Counter(ranks.values()).most_common(1)[0][0]
            others = {f"^{name}": rank for name, rank in sorted(ranks.items()) if rank != common}
            values |= {
                f"{component}r": common,
                f"{component}lora_alpha": common,
                f"{component}rank_pattern": others,
                f"{component}alpha_pattern": others,
                f"{component}target_modules": sorted(ranks),
            }
    return json.dumps(values, sort_keys=True)


def padded_ranks(adapter: Adapter) -> str | None:
    """The true ranks of modules that the kohya format pads, so that reading gives them back."""
    modules = _clean_modules(adapter)
    largest = max(pair.rank for pair in modules.values())
    smaller = {name: pair.rank for name, pair in sorted(modules.items()) if pair.rank < largest}
    return json.dumps(smaller) if smaller else None


def state_to_adapter(state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Adapter:
    """Reads the tensors of a LoRA file of any dialect.

    Diffusers (today's and the old spellings), kohya with any alphas, and plain PEFT keys. Where alpha is
    not the rank the scale is folded into `up`. Tensors become fp32, without gradients.

    Raises:
        AdapterError: If these are no LoRA's tensors, or pairs are incomplete; completes "FILE ...".
    """
    notes = dict(metadata or {})
    dialect = dialect_of(state)
    parts = split_state(state)
    alphas = module_alphas(parts, notes)
    ranks: dict[str, int] = json.loads(notes.get("sdlora.ranks", "{}")) if dialect == "kohya" else {}
    modules = {
        name: _unpad(_read_pair(name, found, alphas[name]), ranks.get(name))
        for name, found in sorted(parts.items())
    }
    rank = max(pair.rank for pair in modules.values())
    trained = {alpha for alpha in alphas.values() if alpha is not None}
    if len(trained) == 1 and trained != {float(rank)}:
        notes.setdefault("sdlora.trained_alpha", f"{trained.pop():g}")
    return Adapter(
        modules, rank, float(rank), guess_family(modules, notes), notes.get("sdlora.parent"), notes
    )


def split_state(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors of a LoRA file by module and part (`down`, `up`, perhaps `alpha`).

    Raises:
        AdapterError: If a tensor is no part of a LoRA, or a pair is incomplete; completes "FILE ...".
    """
    parts: dict[str, dict[str, Tensor]] = {}
    foreign: list[str] = []
    for key, tensor in state.items():
        split = split_key(key)
        if split is None:
            foreign.append(key)
        else:
            parts.setdefault(split[0], {})[split[1]] = tensor
    if foreign:
        raise AdapterError(f"holds {len(foreign)} tensors that are no part of a LoRA: {_some(foreign)}")
    incomplete = [name for name, found in parts.items() if not {"down", "up"} <= set(found)]
    if incomplete:
        raise AdapterError(f"lacks the other half of {len(incomplete)} modules: {_some(incomplete)}")
    return parts


def guess_family(modules: Mapping[str, LowRank], notes: Mapping[str, str]) -> str:
    """The family from the metadata, else from the width of the cross-attention, else empty."""
    known = notes.get("sdlora.family") or _FAMILY_OF_KOHYA.get(notes.get("ss_base_model_version", ""))
    widths = {int(pair.down.shape[1]) for name, pair in modules.items() if name.endswith("attn2.to_k")}
    return known or (_FAMILY_OF_WIDTH.get(widths.pop(), "") if len(widths) == 1 else "")


def _read_pair(name: str, found: Mapping[str, Tensor], alpha: float | None) -> LowRank:
    """One module in fp32, its scale folded in."""
    down, up = found["down"].float(), found["up"].float()
    if down.ndim < 2 or up.ndim != down.ndim or up.shape[1] != down.shape[0]:
        raise AdapterError(
            f"holds a pair that does not fit together: {name} has down {tuple(down.shape)} "
            f"and up {tuple(up.shape)}"
        )
    rank = int(down.shape[0])
    if alpha is not None and alpha != rank:
        up = (up.double() * (alpha / rank)).float()
    return LowRank(down.contiguous(), up.contiguous())


def _unpad(pair: LowRank, rank: int | None) -> LowRank:
    """Takes off the zeros that `adapter_to_kohya` appended."""
    if rank is None or pair.down[rank:].any() or pair.up[:, rank:].any():
        return pair
    return LowRank(pair.down[:rank].contiguous(), pair.up[:, :rank].contiguous())


def module_alphas(
    parts: Mapping[str, Mapping[str, Tensor]], notes: Mapping[str, str]
) -> dict[str, float | None]:
    """Each module's alpha, from its tensor or from PEFT's configuration; None means its rank."""
    try:
        config: dict[str, Any] = json.loads(notes.get("lora_adapter_metadata") or "{}")
    except json.JSONDecodeError:
        raise AdapterError("holds lora_adapter_metadata that is not JSON; export the LoRA again") from None
    alphas: dict[str, float | None] = {}
    for name, found in parts.items():
        component = next((text for text in TEXT_ENCODERS if name.startswith(text)), "unet.")
        own = {
            key.removeprefix(component): value for key, value in config.items() if key.startswith(component)
        }
        own = own or {key: value for key, value in config.items() if "." not in key}
        if "alpha" in found:
            alphas[name] = float(found["alpha"])
        elif "lora_alpha" in own:
            module = name.removeprefix(component)
            patterns: Mapping[str, float] = own.get("alpha_pattern") or {}
            fits = (value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", module))
            alpha = float(next(fits, own["lora_alpha"]))
            rank = int(found["down"].shape[0])
            alphas[name] = alpha * math.sqrt(rank) if own.get("use_rslora") else alpha
        else:
            alphas[name] = None
    return alphas


def _clean_modules(adapter: Adapter) -> dict[str, LowRank]:
    """Modules under the names that files have; whatever wrapped the network has left no trace."""
    modules = {clean_module(name): pair for name, pair in adapter.modules.items()}
    if not modules:
        raise AdapterError("the adapter has no modules, so there is nothing to write")
    strange = [name for name in modules if re.search(r"lora_|(^|\.)(default|unet)(\.|$)", name)]
    if strange or len(modules) != len(adapter.modules):
        raise AdapterError(
            f"module names cannot be written to a LoRA file: {_some(strange or list(adapter.modules))}"
        )
    return modules


def _resize(tensor: Tensor, dim: int, size: int) -> Tensor:
    shape = list(tensor.shape)
    shape[dim] = size - shape[dim]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim) if shape[dim] > 0 else tensor


def _some(names: list[str], count: int = 3) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
