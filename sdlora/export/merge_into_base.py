"""LoRAs merged into a copy of a base."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from sdlora.config import BaseSection
from sdlora.errors import AdapterError, ModelError
from sdlora.export.rewrite import module_of, rewrite, stored_weights
from sdlora.formats.files import AnyAdapter, open_adapter
from sdlora.lora.adapter import Adapter, check_base
from sdlora.lora.attach import check_fit
from sdlora.lora.layers import carrier_layers, component_of
from sdlora.models.info import BaseInfo, inspect_base
from sdlora.models.weights import empty_components
from sdlora.reading import PICKLES
from sdlora.writing import check_writable, temporary_name, write_json

Change: TypeAlias = Callable[[str, str, Tensor], Tensor]


def merge_into_base(
    adapters: Sequence[tuple[AnyAdapter, float]],
    base: str | Path,
    out: str | Path,
    *,
    dtype: torch.dtype | None = None,
    warn: Callable[[str], None] | None = None,
) -> Path:
    """Writes a copy of a base with adapters added to its weights: a diffusers folder, or a file if it is one.

    Args:
        adapters: (adapter, file or run, strength); a child after its ancestors.
        base: A diffusers folder, a hub id or one file.
        out: A new folder or `.safetensors` file.
        dtype: Of all weights; None keeps that of each.
        warn: Called with a line for each adapter that was trained on another base of the family.

    Raises:
        AdapterError: If an adapter does not fit, or changes layers that are fused in the base's file.
        ModelError: If the output path exists or does not suit this base, or weights would not be finite.
    """
    info, place = inspect_base(BaseSection(source=str(base))), Path(out)
    _check_place(info, place)
    opened = [(open_adapter(source), strength) for source, strength in adapters]
    text = any(adapter.changes_text for adapter, _ in opened)
    layers = carrier_layers(empty_components(info, text=text))
    for adapter, _ in opened:
        check_fit(adapter.without(info.unread_layer), layers)
        line = check_base(adapter, family=info.family, name=info.name, digest=info.digest)
        if line and warn:
            warn(line)
    change = _make_change(info, opened)
    if info.path.is_file():
        return rewrite([info.path], place, partial(change, ""), dtype)
    temporary = temporary_name(place)
    try:
        _write_folder(info, temporary, change, dtype)
        inspect_base(BaseSection(source=str(temporary)))
        temporary.replace(place)
    except BaseException:
        with suppress(OSError):
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return place


def _check_place(info: BaseInfo, place: Path) -> None:
    if place.exists():
        problem = f"--out {place} already exists; a base is never changed in place, so use another name"
        raise ModelError(problem, key="option--out")
    if info.path.resolve() in Path(os.path.realpath(place)).parents:
        problem = f"--out {place} is inside the base {info.path}, which is never changed; use another path"
        raise ModelError(problem, key="option--out")
    if info.path.is_file() != (place.suffix == ".safetensors"):
        kind = "file, so use a .safetensors file" if info.path.is_file() else "folder, so use a folder"
        problem = f"--out {place} does not match the base {info.name}, which is a {kind}"
        raise ModelError(problem, key="option--out")
    check_writable(place)


def _make_change(info: BaseInfo, adapters: Sequence[tuple[Adapter, float]]) -> Change:
    """Maps a component, a name in its files and a tensor to the tensor with the change of the adapters."""
    modules: dict[tuple[str, str], str] = {}
    names = {name for adapter, _ in adapters for name in adapter.modules}
    for component in {component_of(name) for name in names}:
        for stored, (name, _) in stored_weights(info.components[component]).items():
            if (module := module_of(component, name)) in names:
                modules[component if info.path.is_dir() else "", stored] = module
    if missing := names - set(modules.values()):
        raise AdapterError(
            f"{len(missing)} modules, such as {min(missing)}, are fused with others in {info.path}; "
            "use the base as a diffusers folder",
            key="base.fused",
        )

    def change(component: str, stored: str, tensor: Tensor) -> Tensor:
        if (module := modules.get((component, stored))) is None:
            return tensor
        weight = tensor.double()
        total = weight.clone()
        for adapter, strength in adapters:
            if own := adapter.modules.get(module):
                total += own.delta_weight(weight, strength * adapter.scale_of(module), total)
        return total

    return change


def _write_folder(info: BaseInfo, folder: Path, change: Change, dtype: torch.dtype | None) -> None:
    """A whole diffusers folder, with plain file names for weights; other files are copied."""
    parts = {name: part for name, part in info.components.items() if part.folder is not None}
    places = {info.path, *(part.folder for part in parts.values())}

    def left_out(path: str, names: list[str]) -> list[str]:
        is_rewritten = Path(path) in places
        return [n for n in names if n.endswith(PICKLES) or (is_rewritten and ".safetensors" in n)]

    shutil.copytree(info.path, folder, ignore=left_out)
    for name, part in parts.items():
        stem = "model" if name.startswith("text_encoder") else "diffusion_pytorch_model"
        rewrite(part.files, folder / name / f"{stem}.safetensors", partial(change, name), dtype)
        # A configuration may name the dtype to load it in.
        dtypes = (
            {}
            if dtype is None
            else dict.fromkeys(("dtype", "torch_dtype"), str(dtype).removeprefix("torch."))
        )
        known = {key: text for key, text in dtypes.items() if key in part.config}
        write_json(folder / name / "config.json", {**part.config, **known})
