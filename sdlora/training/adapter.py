"""The adapter of a run: its parents, and its initial values."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace

from sdlora.config import LoraSection, RunConfig
from sdlora.errors import AdapterError, ConfigError, RunError
from sdlora.formats.files import load_adapter, resolve_adapter
from sdlora.lora.adapter import KINDS, Adapter, check_base, draw_adapter, for_family, low_rank_modules
from sdlora.lora.attach import check_fit
from sdlora.lora.layers import Model, component_of, components
from sdlora.lora.layout import Layout
from sdlora.models.info import BaseInfo
from sdlora.rank.init_from import InitReport, check_init_targets, init_from_adapter
from sdlora.tree.lineage import PathEntry, check_additive, load_path

SMALLEST_RANK = 4


def find_parents(lora: LoraSection, warn: Callable[[str], None]) -> tuple[PathEntry, ...]:
    """The parent with its ancestors, the root first; empty without `lora.parent`.

    Args:
        lora: The settings.
        warn: Called with a line for each mismatch that `lora.force_parent` accepts.

    Raises:
        AdapterError: If the parent, or one of its ancestors, is missing, changed, or of a kind that cannot be
            added to others.
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
    """Checks that the parents fit the base.

    Args:
        parents: From `find_parents`.
        info: The base.
        model: The denoiser, or components by name; they may lie on the meta device.

    Returns:
        Warnings for those that were trained on another base of the family.

    Raises:
        AdapterError: If one of them is for another family or does not fit.
    """
    lines = []
    for step in parents:
        line = check_base(
            step.adapter, family=info.family, name=info.name, digest=info.digest, source=str(step.file)
        )
        parts = components(model)
        read = step.adapter.without(info.unread_layer)
        own = {name: pair for name, pair in read.modules.items() if component_of(name) in parts}
        check_fit(replace(read, modules=own), model, str(step.file))
        lines += [line] if line else []
    return lines


def with_parents(config: RunConfig, parents: Sequence[PathEntry]) -> tuple[RunConfig, str | None]:
    """The settings with the path of the parent and, by default, half of its rank.

    Returns:
        The settings, and a notice about the rank if it was not set.
    """
    if not parents:
        return config, None
    above = parents[-1].adapter.rank
    changes: dict[str, object] = {"parent": str(parents[-1].file.resolve())}
    if "rank" in config.lora.model_fields_set:
        return config.replace(lora=changes), None
    rank = max(SMALLEST_RANK, above // 2)
    line = (
        f"lora.rank = {rank}, half of its parent's {above} and at least {SMALLEST_RANK}; "
        "set lora.rank to choose another"
    )
    return config.replace(lora={**changes, "rank": rank}), line


def text_digest(info: BaseInfo, parents: Sequence[PathEntry]) -> str:
    """The digest of the text encoders with the parents' changes, for the cache of text states."""
    changing = [step.ancestor for step in parents if step.adapter.changes_text]
    if not changing:
        return info.text_digest
    parts = [info.text_digest, *(f"{one.digest} {one.strength}" for one in changing)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def check_init_from(config: RunConfig, info: BaseInfo, model: Model, layout: Layout) -> str | None:
    """Checks that `lora.init_from` fits the base and the targets, before weights are loaded.

    Returns:
        A warning if the file is for another base of the same family.

    Raises:
        SdloraError: If the file is missing or does not fit.
    """
    if config.lora.init_from is None:
        return None
    key = f"lora.init_from = {config.lora.init_from}"
    start = _load_start(config.lora.init_from, info)
    low_rank_modules(start, key)
    if not KINDS[layout.kind].is_additive:
        raise ConfigError(
            f"{key} does not go with lora.kind = {layout.kind}: its magnitudes start at the norms of the "
            "base weights; set lora.kind=lora or remove lora.init_from"
        )
    warning = check_base(start, family=info.family, name=info.name, digest=info.digest, source=key)
    # lora.targets cannot reach the modules of other networks.
    own = {name: pair for name, pair in start.modules.items() if component_of(name) in components(model)}
    check_fit(replace(start, modules=own), model, key)
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
