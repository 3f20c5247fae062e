"""A base with LoRAs inside, as a base of its own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sdlora.config import BaseSection
from sdlora.errors import AdapterError, ModelError
from sdlora.export.rewrite import module_of, rewrite, stored_weights
from sdlora.lora.adapter import Adapter, check_base
from sdlora.lora.attach import check_fit
from sdlora.lora.layers import component_of
from sdlora.models.info import BaseInfo, inspect_base
from sdlora.models.weights import empty_components
from sdlora.reading import PICKLES
from sdlora.writing import check_writable, temporary_name, write_json


def merge_into_base(
    adapters: Sequence[tuple[Adapter, float]],
    base: str | Path,
    out: str | Path,
    *,
    dtype: torch.dtype | None = None,
    warn: Callable[[str], None] | None = None,
) -> Path:
    """Writes a base with adapters added to its weights; the base itself is only read.

    A diffusers folder becomes a whole diffusers folder, a base in one file becomes one file.

    Args:
        adapters: (adapter, strength); a child needs its ancestors before it.
        base: A diffusers folder, a hub id or one file.
        out: A folder or a `.safetensors` file that is not there yet.
        dtype: Of all weights; None keeps that of each.
        warn: Told of adapters that were trained on another base of the family.

    Returns:
        What was written.

    Raises:
        AdapterError: If an adapter does not fit, or changes layers that the base's file has in another form.
        ModelError: If the output path exists or does not suit this base, or weights would not be finite.
    """
    info, place = inspect_base(BaseSection(source=str(base))), Path(out)
    _check_place(info, place)
    parts = empty_components(info, text=any(adapter.changes_text for adapter, _ in adapters))
    for adapter, _ in adapters:
        check_fit(adapter.without(info.unread_layer), parts)
        line = check_base(adapter, family=info.family, name=info.name, digest=info.digest)
        if line and warn:
            warn(line)
    change = _Change(info, adapters)
    if info.path.is_file():
        return rewrite([info.path], place, change, dtype)
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
        raise ModelError(
            f"--out {place} already exists; a base is never changed in place, so use another name"
        )
    if info.path.resolve() in Path(os.path.realpath(place)).parents:
        raise ModelError(
            f"--out {place} is inside the base {info.path}, which is never changed; use another path"
        )
    if info.path.is_file() != (place.suffix == ".safetensors"):
        kind = (
            "a single file, so use a .safetensors file"
            if info.path.is_file()
            else "a folder, so use a folder"
        )
        raise ModelError(f"--out {place} does not match the base {info.name}, which is {kind}")
    check_writable(place)


class _Change:
    """What adapters add to the tensors of a base, by component and name in its files."""

    def __init__(self, info: BaseInfo, adapters: Sequence[tuple[Adapter, float]]) -> None:
        self.adapters = adapters
        self.modules: dict[tuple[str, str], str] = {}
        names = {name for adapter, _ in adapters for name in adapter.modules}
        for component in {component_of(name) for name in names}:
            for stored, (name, _) in stored_weights(info.components[component]).items():
                if (module := module_of(component, name)) in names:
                    self.modules[component if info.path.is_dir() else "", stored] = module
        if missing := names - set(self.modules.values()):
            raise AdapterError(
                f"{len(missing)} modules, such as {min(missing)}, are fused with others in {info.path}; "
                "use the base as a diffusers folder"
            )

    def __call__(self, stored: str, tensor: Tensor, component: str = "") -> Tensor:
        """The tensor with every change of its module added, in fp64 where there is one."""
        module = self.modules.get((component, stored))
        if module is None:
            return tensor
        weight = tensor.double()
        total = weight.clone()
        for adapter, strength in self.adapters:
            if own := adapter.modules.get(module):
                total += own.delta_weight(weight, strength * adapter.scale_of(module), total)
        return total


def _write_folder(info: BaseInfo, folder: Path, change: _Change, dtype: torch.dtype | None) -> None:
    """A whole diffusers folder: every part with plain file names, everything else as it was."""
    parts = {name: part for name, part in info.components.items() if part.folder is not None}
    places = {info.path, *(part.folder for part in parts.values())}

    def left_out(path: str, names: list[str]) -> list[str]:
        is_rewritten = Path(path) in places
        return [n for n in names if n.endswith(PICKLES) or (is_rewritten and ".safetensors" in n)]

    shutil.copytree(info.path, folder, ignore=left_out)
    for name, part in parts.items():
        stem = "model" if name.startswith("text_encoder") else "diffusion_pytorch_model"
        rewrite(part.files, folder / name / f"{stem}.safetensors", partial(change, component=name), dtype)
        _write_config(folder / name / "config.json", part.config, dtype)


def _write_config(path: Path, config: Mapping[str, object], dtype: torch.dtype | None) -> None:
    """The part's configuration, which may name the dtype that it is loaded in."""
    values = dict(config)
    for key in ("dtype", "torch_dtype"):
        if dtype is not None and key in values:
            values[key] = str(dtype).removeprefix("torch.")
    write_json(path, values)
