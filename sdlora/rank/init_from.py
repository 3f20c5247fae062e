"""Initializing an adapter from another LoRA file: the same change, at another rank."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import NamedTuple

import torch

from sdlora.errors import ConfigError
from sdlora.lora.adapter import Adapter, low_rank_modules
from sdlora.lora.layers import DENOISER, component_of
from sdlora.rank.svd import decompose


class InitReport(NamedTuple):
    """Numbers of modules by how they were initialized, and the error of truncation.

    `error` is the norm of the truncated part over the norm of the whole change.
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
    """Raises a ConfigError if an adapter, called `source`, has modules that are not trained."""
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

    With a larger rank, the further rows of `down` stay as drawn, and the columns of `up` zero: the change is
    the same, and the new directions can learn. With a smaller rank, a module gets the nearest product.
    Modules that `start`, checked by `check_init_targets`, lacks stay fresh.
    """
    padded, truncated, lost, whole = 0, 0, 0.0, 0.0
    fresh_pairs = low_rank_modules(adapter, "lora.init_from")
    for name, pair in low_rank_modules(start, "lora.init_from").items():
        own, scale = fresh_pairs[name], start.scale_of(name)
        pair = pair.with_kernel(own.down.ndim == 4)
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
