"""A limit on how far each module may be changed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sdlora.lora.adapter import Adapter


@dataclass(frozen=True, slots=True)
class NormReport:
    """The norms of the changes `scale * up @ down`, after they were limited."""

    num_limited: int
    mean: float
    largest: float


@torch.no_grad()
def limit_norms(adapter: Adapter, max_norm: float) -> NormReport:
    """Shrinks the modules whose change has a Frobenius norm above a limit, down to it (as kohya's tools do).

    Both factors of such a module are multiplied by the root of `max_norm / norm`.

    Args:
        adapter: Changed in place.
        max_norm: The limit for each module.
    """
    norms = []
    for name, pair in adapter.modules.items():
        down, up = pair.down.flatten(1), pair.up.flatten(1)
        # The norm of the product from the two Gram matrices, (R, R), without forming it.
        squared = ((up.T @ up) * (down @ down.T)).sum().clamp(min=0)
        norm = squared.sqrt() * abs(adapter.scale_of(name))
        factor = (max_norm / norm.clamp(min=max_norm)).sqrt()
        pair.down.mul_(factor)
        pair.up.mul_(factor)
        norms.append(norm)
    before = torch.stack(norms)
    after = before.clamp(max=max_norm)
    return NormReport(int((before > max_norm).sum()), float(after.mean()), float(after.max()))
