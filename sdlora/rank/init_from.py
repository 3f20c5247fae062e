"""Initialising a fresh adapter from another LoRA file: the same change, at another rank."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch

from sdlora.errors import ConfigError
from sdlora.lora.adapter import Adapter, low_rank_modules
from sdlora.lora.layers import DENOISER, component_of
from sdlora.rank.svd import decompose


@dataclass(frozen=True, slots=True)
class InitReport:
    """How modules were initialised from a file.

    `error` is the norm of what truncation lost over the norm of the whole change.
    """

    num_kept: int
    num_padded: int
    num_truncated: int
    num_fresh: int
    error: float

    def __str__(self) -> str:
        parts = {
            "modules copied": self.num_kept,
            "padded to a larger rank (exact)": self.num_padded,
            f"truncated to a smaller rank (error {self.error:.2%} of the whole change)": self.num_truncated,
            "not in the file (fresh)": self.num_fresh,
        }
        return ", ".join(f"{number} {text}" for text, number in parts.items() if number)


def check_init_targets(start: Adapter, targets: Collection[str], source: str) -> None:
    """Raises a ConfigError if modules of an adapter are not trained.

    Args:
        start: Loaded from the file.
        targets: The modules that are trained.
        source: The setting, such as `lora.init_from = style.safetensors`.
    """
    if left_out := [name for name in start.modules if name not in targets]:
        has_text = any(component_of(name) != DENOISER for name in left_out)
        text = "lora.text_encoder=true and " if has_text else ""
        raise ConfigError(
            f"{source} has {len(left_out)} of its {len(start.modules)} modules outside lora.targets, such as "
            f"{left_out[0]}; set {text}lora.targets to include them",
            key="lora.targets",
        )


@torch.no_grad()
def init_from_adapter(adapter: Adapter, start: Adapter) -> InitReport:
    """Copies the change of another adapter into a fresh one, module by module.

    A larger rank keeps its further rows of `down` as drawn, with zero columns of `up`: the same change, and
    directions that can learn. A smaller rank gets the nearest product of that rank.

    Args:
        adapter: Fresh; changed in place. Modules that the other one lacks stay fresh.
        start: Checked by `check_init_targets`.
    """
    padded, truncated, lost, whole = 0, 0, 0.0, 0.0
    fresh_pairs = low_rank_modules(adapter, "lora.init_from")
    for name, pair in low_rank_modules(start, "lora.init_from").items():
        own, scale = fresh_pairs[name], start.scale_of(name)
        whole += scale**2 * pair.norm_squared()
        if pair.rank > own.rank:
            found = decompose(pair)
            lost += scale**2 * float(found.values[own.rank :].square().sum())
            pair = found.truncate(own.rank)
            truncated += 1
        elif pair.rank < own.rank:
            padded += 1
        own.down[: pair.rank] = pair.down.to(own.down)
        own.up[:, : pair.rank] = (pair.up * (scale / adapter.scale_of(name))).to(own.up)
    kept, fresh = len(start.modules) - padded - truncated, len(adapter.modules) - len(start.modules)
    return InitReport(kept, padded, truncated, fresh, math.sqrt(lost / whole) if lost else 0.0)
