"""The weights of a base by the names that adapters use."""

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
    """What a part's files hold: the name in the file to diffusers' (or transformers') name and the shape.

    Fused layers of text encoders, which single files of SD 2 and SDXL have, keep their own names.
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
    """Some tensors of a part, one after the other.

    Args:
        part: The part.
        wanted: Name in the file to what to call it; in the order they are read.
    """
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
    """Writes the tensors of some safetensors files into one, each as a function of what it was.

    Args:
        files: Of one part, or a whole base in one file.
        out: The file to write; it is complete or not there.
        change: Given the name in the file and the tensor; gives one of the same shape.
        dtype: Of floating-point tensors; None keeps each tensor's own.

    Raises:
        ModelError: If values that were finite would not be.
    """
    headers = [(file, read_header(file)) for file in files]
    kinds: dict[str, torch.dtype] = {}
    shapes: dict[str, Sequence[int]] = {}
    for _, header in headers:
        for stored in sorted(header.spans, key=lambda name: header.spans[name]):
            own = STORED[header.dtypes[stored]]
            kinds[stored] = dtype if dtype is not None and own.is_floating_point else own
            shapes[stored] = header.shapes[stored]
    start = header_bytes(
        ((stored, kinds[stored], shape) for stored, shape in shapes.items()),
        {**headers[0][1].metadata, "format": "pt"},
    )

    def write(path: Path) -> None:
        with path.open("wb") as handle:
            handle.write(start)
            for file, header in headers:
                with file.open("rb") as source:
                    for stored in sorted(header.spans, key=lambda name: header.spans[name]):
                        before = read_stored(source, header, stored)
                        value = change(stored, before).to(kinds[stored])
                        _check_values(stored, before, value)
                        handle.write(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    return write_file(out, write, read_header)


def _check_values(name: str, before: Tensor, after: Tensor) -> None:
    # Some files hold masks of -inf, which are right.
    if not after.float().isfinite().all() and before.float().isfinite().all():
        dtype = str(after.dtype).removeprefix("torch.")
        raise ModelError(
            f"{name} would hold values that are not finite in {dtype}; use a smaller --strength, "
            "or --dtype fp32"
        )


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
        if part := info.components.get(component):
            wanted = {
                key: module
                for key, (name, _) in stored_weights(part).items()
                if (module := module_of(component, name)) in set(names)
            }
            norms |= {module: float(weight.double().norm()) for module, weight in read_weights(part, wanted)}
    return norms
