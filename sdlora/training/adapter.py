"""The adapter of a run: its parents, and its initial values."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace

from sdlora.config import LoraSection, RunConfig
from sdlora.errors import AdapterError, ConfigError, RunError
from sdlora.formats.files import load_adapter, resolve_adapter
from sdlora.lora.adapter import KINDS, Adapter, check_base, draw_adapter, for_family, low_rank_modules
from sdlora.lora.attach import Layout, check_fit
from sdlora.lora.layers import Model, carrier_layers, component_of, components
from sdlora.models.info import BaseInfo
from sdlora.rank.resize import InitReport, check_init_targets, init_from_adapter
from sdlora.tree.lineage import PathEntry, check_additive, load_path

SMALLEST_RANK = 4


def find_parents(lora: LoraSection, warn: Callable[[str], None]) -> tuple[PathEntry, ...]:
    """The parent with its ancestors, the root first; empty without `lora.parent`.

    `warn` is called with a line for each mismatch that `lora.force_parent` accepts. Raises an AdapterError if
    one of them is missing, changed, or of a kind that cannot be added to others.
    """
    if lora.parent is None:
        return ()
    try:
        file = resolve_adapter(lora.parent).file
    except AdapterError as error:
        raise AdapterError(f"lora.parent = {error}", key="lora.parent") from None
    path = load_path(file, force=lora.force_parent, warn=warn)
    for entry in path:
        check_additive(entry.file, entry.adapter)
    return tuple(path)


def check_parents(parents: Sequence[PathEntry], info: BaseInfo, model: Model) -> list[str]:
    """Raises an AdapterError if a parent does not fit the base; returns warnings about other bases.

    The model is a network, or components by name; it may lie on the meta device.
    """
    lines = []
    for parent in parents:
        source = str(parent.file)
        lines.append(check_base(parent.adapter, **_names(info), source=source))
        _check_own_modules(parent.adapter.without(info.unread_layer), model, source)
    return [line for line in lines if line]


def _check_own_modules(adapter: Adapter, model: Model, source: str) -> None:
    """Checks that the modules of an adapter fit, without those of components that are not there."""
    parts = components(model)
    own = {name: module for name, module in adapter.modules.items() if component_of(name) in parts}
    check_fit(replace(adapter, modules=own), carrier_layers(model), source)


def _names(info: BaseInfo) -> dict[str, str]:
    return {"family": info.family, "name": info.name, "digest": info.digest}


def with_parents(config: RunConfig, parents: Sequence[PathEntry]) -> tuple[RunConfig, str | None]:
    """The settings with the parent's path and, by default, half of its rank; and a notice about that."""
    if not parents:
        return config, None
    above = parents[-1].adapter.rank
    changes: dict[str, object] = {"parent": str(parents[-1].file.resolve())}
    if "rank" in config.lora.model_fields_set:
        return config.replace(lora=changes), None
    rank = max(SMALLEST_RANK, above // 2)
    half = f"lora.rank = {rank}, half of its parent's {above} and at least {SMALLEST_RANK}"
    return config.replace(lora={**changes, "rank": rank}), f"{half}; set lora.rank to choose another"


def text_digest(info: BaseInfo, parents: Sequence[PathEntry]) -> str:
    """The digest of the text encoders with the parents' changes, for the cache of text states."""
    changing = [step.ancestor for step in parents if step.adapter.changes_text]
    if not changing:
        return info.text_digest
    parts = [info.text_digest, *(f"{one.digest} {one.strength}" for one in changing)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def check_init_from(config: RunConfig, info: BaseInfo, model: Model, layout: Layout) -> str | None:
    """Raises an SdloraError if `lora.init_from` does not fit; returns a warning about another base."""
    if config.lora.init_from is None:
        return None
    key = f"lora.init_from = {config.lora.init_from}"
    start = _load_start(config.lora.init_from, info)
    low_rank_modules(start, key)
    if not KINDS[layout.kind].is_additive:
        problem = f"{key} conflicts with lora.kind = {layout.kind}, which starts at the base's norms"
        raise ConfigError(f"{problem}; set lora.kind=lora or remove lora.init_from")
    warning = check_base(start, **_names(info), source=key)
    # lora.targets cannot reach the modules of other networks.
    _check_own_modules(start, model, key)
    check_init_targets(start, layout.ranks, key)
    return warning


def make_adapter(
    config: RunConfig, info: BaseInfo, model: Model, layout: Layout
) -> tuple[Adapter, InitReport | None]:
    """The trainable adapter, and a report of its initialization from `lora.init_from`, if set."""
    lora = config.lora
    adapter = draw_adapter(
        model, layout.ranks, layout.scales(), seed=config.train.seed, init=lora.init, kind=layout.kind
    )
    adapter = for_family(adapter, info.family, model)
    return adapter, init_from_adapter(adapter, _load_start(lora.init_from, info)) if lora.init_from else None


def _load_start(source: str, info: BaseInfo) -> Adapter:
    """The adapter of a file or run, without the layer that some trainers adapt but the base never uses."""
    try:
        return load_adapter(source).without(info.unread_layer)
    except (AdapterError, RunError) as error:
        raise AdapterError(f"lora.init_from: {error}", key=next(iter(error.keys), "")) from None
