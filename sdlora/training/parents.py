"""What a child is trained on top of: its ancestors, found, checked and loaded before the base is."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace

from sdlora.config import LoraSection, RunConfig
from sdlora.errors import AdapterError
from sdlora.lora.adapter import check_base
from sdlora.lora.ancestors import Step, find_source, load_path
from sdlora.lora.attach import check_fit
from sdlora.lora.modules import Model, components
from sdlora.lora.names import component_of
from sdlora.models.info import BaseInfo

SMALLEST_RANK = 4


def find_parents(lora: LoraSection, warn: Callable[[str], None]) -> tuple[Step, ...]:
    """The path that the run stands on, the root first; empty without `lora.parent`.

    Args:
        lora: The settings.
        warn: Told of what `lora.force_parent` takes or goes without.

    Raises:
        AdapterError: If the parent, or one of its ancestors, is missing or changed.
    """
    if lora.parent is None:
        return ()
    try:
        file = find_source(lora.parent)
    except AdapterError as error:
        raise AdapterError(f"lora.parent = {error}") from None
    return tuple(load_path(file, force=lora.force_parent, warn=warn))


def check_parents(parents: Sequence[Step], info: BaseInfo, model: Model) -> list[str]:
    """Whether the path goes with the base.

    Args:
        parents: From `find_parents`.
        info: The base.
        model: Its UNet, or components by name; they may lie on the meta device.

    Returns:
        Lines to warn with, of those that were trained on another base of the family.

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


def with_parents(config: RunConfig, parents: Sequence[Step]) -> tuple[RunConfig, str | None]:
    """The settings with what follows from the parent: where its file is, and half its rank.

    Returns:
        The settings, and a line about the rank if it was not given.
    """
    if not parents:
        return config, None
    above = parents[-1].adapter.rank
    changes: dict[str, object] = {"parent": str(parents[-1].file.resolve())}
    if "rank" in config.lora.model_fields_set:
        return config.replace(lora=changes), None
    rank = max(SMALLEST_RANK, above // 2)
    line = (
        f"lora.rank = {rank}: half of the {above} of its parent, at least {SMALLEST_RANK}; "
        "set lora.rank for another"
    )
    return config.replace(lora={**changes, "rank": rank}), line


def describe_parents(parents: Sequence[Step]) -> list[str]:
    """A line for the plan."""
    path = " > ".join(f"{step.ancestor} rank {step.adapter.rank}" for step in parents)
    return [f"parent    {path}; mounted and frozen, the new adapter on top"] if parents else []


def text_digest(info: BaseInfo, parents: Sequence[Step]) -> str:
    """The fingerprint of what encodes captions: the base's text encoders with what the path adds to them."""
    changing = [step.ancestor for step in parents if step.adapter.changes_text]
    if not changing:
        return info.text_digest
    parts = [info.text_digest, *(f"{one.digest} {one.strength}" for one in changing)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
