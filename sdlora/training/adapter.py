"""The adapter of a run: fresh, or with the change of another LoRA file."""

from __future__ import annotations

from dataclasses import replace

from sdlora.config import RunConfig
from sdlora.errors import AdapterError, RunError
from sdlora.export import find_adapter
from sdlora.lora.adapter import Adapter, check_base, draw_adapter
from sdlora.lora.attach import check_fit
from sdlora.lora.files import load_adapter
from sdlora.lora.layout import Layout
from sdlora.lora.modules import Model, components
from sdlora.lora.names import component_of
from sdlora.lora.start import StartReport, check_start, start_from
from sdlora.models.info import BaseInfo


def check_init_from(config: RunConfig, info: BaseInfo, model: Model, layout: Layout) -> str | None:
    """Whether a run can start from `lora.init_from`, before any weight is loaded.

    Args:
        config: The settings.
        info: The base.
        model: Its network, or components by name; it may lie on the meta device.
        layout: The modules that are trained.

    Returns:
        A line to warn with if the file is for another base of the same family.

    Raises:
        SdloraError: If there is no such file, or it does not go with base and targets.
    """
    if config.lora.init_from is None:
        return None
    key = f"lora.init_from = {config.lora.init_from}"
    start = _load_start(config.lora.init_from, info)
    warning = check_base(start, family=info.family, name=info.name, digest=info.digest, source=key)
    # What another network has is not for lora.targets to reach.
    own = {name: pair for name, pair in start.modules.items() if component_of(name) in components(model)}
    check_fit(replace(start, modules=own), model, key)
    check_start(start, layout.ranks, key)
    return warning


def make_adapter(
    config: RunConfig, info: BaseInfo, model: Model, layout: Layout
) -> tuple[Adapter, StartReport | None]:
    """The trainable adapter, and how it took over `lora.init_from` if that is set."""
    lora = config.lora
    adapter = draw_adapter(
        model,
        layout.ranks,
        layout.scales(),
        seed=config.train.seed,
        init=lora.init,
        family=info.family,
    )
    return adapter, start_from(adapter, _load_start(lora.init_from, info)) if lora.init_from else None


def _load_start(source: str, info: BaseInfo) -> Adapter:
    """The LoRA to start from, a file or a run's, without what other trainers adapt though nobody reads it."""
    try:
        return load_adapter(find_adapter(source)).without(info.unread_layer)
    except (AdapterError, RunError) as error:
        raise AdapterError(f"lora.init_from: {error}") from None
