"""The weights of a base, by the names that adapters use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sdlora.config import BaseSection
from sdlora.dtypes import STORED
from sdlora.errors import ModelError
from sdlora.formats.container import header_bytes
from sdlora.lora.layers import DENOISER, component_of, module_name
from sdlora.models.components import Component, read_header
from sdlora.models.info import inspect_base
from sdlora.models.weights import denoiser_names, read_stored
from sdlora.writing import write_file


def stored_weights(part: Component) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Names in a part's files, with diffusers' (or transformers') names and shapes.

    Fused layers of text encoders, as in single files of SD 2 and SDXL, keep their own names.
    """
    names = denoiser_names(part) if part.folder is None and part.name == DENOISER else None
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in part.files:
        for stored, shape in read_header(file).shapes.items():
            if stored.startswith(part.prefix):
                name = stored.removeprefix(part.prefix) if names is None else names.get(stored)
                if name is not None:
                    found[stored] = (name, shape)
    return found


def read_weights(part: Component, wanted: Mapping[str, str]) -> Iterator[tuple[str, Tensor]]:
    """Some tensors of a part, one after the other; `wanted` maps names in the file to names of the result."""
    headers = [(file, read_header(file)) for file in part.files]
    places = {stored: (file, header) for file, header in headers for stored in header.shapes}
    for stored, name in wanted.items():
        file, header = places[stored]
        with file.open("rb") as handle:
            yield name, read_stored(handle, header, stored)


def rewrite(
    files: Sequence[Path],
    out: Path,
    change: Callable[[str, Tensor], Tensor],
    dtype: torch.dtype | None = None,
) -> Path:
    """Writes the tensors of safetensors files (of a part or of a whole base), changed by name, into one file.

    `dtype` is that of floating-point tensors; without one each keeps its own. Raises a ModelError if finite
    values would become non-finite.
    """
    headers = [(file, read_header(file)) for file in files]
    layout: dict[str, Tensor] = {}
    for _, header in headers:
        for name in sorted(header.spans, key=header.spans.__getitem__):
            own = STORED[header.dtypes[name]]
            kind = dtype if dtype is not None and own.is_floating_point else own
            layout[name] = torch.empty(header.shapes[name], dtype=kind, device="meta")

    def write(path: Path) -> None:
        with path.open("wb") as handle:
            handle.write(header_bytes(layout, {**headers[0][1].metadata, "format": "pt"}))
            for file, header in headers:
                with file.open("rb") as source:
                    for name in sorted(header.spans, key=header.spans.__getitem__):
                        before = read_stored(source, header, name)
                        after = change(name, before).to(layout[name].dtype)
                        _check_finite(name, before, after)
                        handle.write(after.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    return write_file(out, write, read_header)


def _check_finite(name: str, before: Tensor, after: Tensor) -> None:
    # Some files have masks of -inf, which are right.
    if not after.float().isfinite().all() and before.float().isfinite().all():
        dtype = str(after.dtype).removeprefix("torch.")
        problem = f"{name} would have non-finite values in {dtype}; use a smaller --strength, or --dtype fp32"
        raise ModelError(problem, key="base.non-finite")


def module_of(component: str, name: str) -> str:
    """The adapter's name of a weight's module; other tensors keep their own names."""
    module, _, own = name.rpartition(".")
    return module_name(component, module if own == "weight" else name)


def weight_norms(base: str | Path, names: Sequence[str]) -> dict[str, float]:
    """The Frobenius norms of modules' weights in a base, read one at a time; unknown modules are left out."""
    info = inspect_base(BaseSection(source=str(base)))
    norms: dict[str, float] = {}
    for component in dict.fromkeys(map(component_of, names)):
        if part := info.components.get(component):
            wanted = {
                key: module
                for key, (name, _) in stored_weights(part).items()
                if (module := module_of(component, name)) in set(names)
            }
            norms |= {module: float(weight.double().norm()) for module, weight in read_weights(part, wanted)}
    return norms
