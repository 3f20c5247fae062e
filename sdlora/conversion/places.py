"""The weights of a base by the names that adapters use."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sdlora.config import BaseSection
from sdlora.lora.names import component_of, module_name
from sdlora.models.info import inspect_base
from sdlora.models.rewrite import read_weights, stored_weights


def module_of(component: str, name: str) -> str:
    """The adapter's name of the module that a weight is of; anything else keeps its own name."""
    module, _, own = name.rpartition(".")
    return module_name(component, module if own == "weight" else name)


def weight_norms(base: str | Path, names: Sequence[str]) -> dict[str, float]:
    """The Frobenius norms of some modules' weights in a base, read one at a time.

    Args:
        base: A diffusers folder, a hub id or one file.
        names: Modules; those that it does not have are left out.
    """
    info = inspect_base(BaseSection(source=str(base)))
    norms: dict[str, float] = {}
    for component in dict.fromkeys(map(component_of, names)):
        if part := info.parts.get(component):
            wanted = {
                key: module
                for key, (name, _) in stored_weights(part).items()
                if (module := module_of(component, name)) in set(names)
            }
            norms |= {module: float(weight.double().norm()) for module, weight in read_weights(part, wanted)}
    return norms
