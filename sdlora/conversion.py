"""Between adapters and whole bases: a LoRA out of a fine-tuned base, and a base with a LoRA inside."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sdlora.config import BaseSection
from sdlora.errors import AdapterError, ModelError
from sdlora.lora.adapter import Adapter, LowRank, check_base
from sdlora.lora.attach import check_fit, match_modules
from sdlora.lora.decompose import decompose_dense
from sdlora.lora.names import component_of, module_name
from sdlora.models.info import BaseInfo, inspect_base
from sdlora.models.load import empty_components
from sdlora.models.parts import Part
from sdlora.models.rewrite import read_weights, rewrite, stored_weights
from sdlora.reading import PICKLES

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ExtractReport:
    """How well a LoRA holds what fine-tuning changed.

    Args:
        num_modules: Modules with a pair.
        num_unchanged: Modules of the targets that fine-tuning left as they were.
        error: Of the targets: norm of what the rank cannot hold over the norm of the change.
        outside: The share of the whole change's energy that lies outside of the targets: in other modules,
            in norms and biases.
    """

    num_modules: int
    num_unchanged: int
    error: float
    outside: float

    def lines(self) -> list[str]:
        """For people."""
        unchanged = f", {self.num_unchanged} were not changed" if self.num_unchanged else ""
        return [
            f"extracted {self.num_modules} modules{unchanged}; error {self.error:.2%} of their change",
            f"outside   {self.outside:.2%} of the energy of the whole change is in weights that lora.targets "
            "leaves out",
        ]


def extract(
    tuned: str | Path,
    base: str | Path,
    *,
    rank: int = 32,
    targets: Sequence[str] = ("all-linear",),
    text_encoder: bool = False,
    progress: Progress | None = None,
) -> tuple[Adapter, ExtractReport]:
    """The LoRA that is nearest to what fine-tuning changed in a base, module by module.

    Args:
        tuned: The fine-tuned base: a diffusers folder, a hub id or one file.
        base: The one that it was made of.
        rank: Of each module.
        targets: As `lora.targets`.
        text_encoder: Look at text encoders too, which `targets` must name.
        progress: Told (finished, total) modules.

    Returns:
        The adapter, and how well it holds the change.

    Raises:
        ModelError: If the two are of different families or sizes.
        AdapterError: If nothing was changed.
    """
    new, old = (inspect_base(BaseSection(source=str(source))) for source in (tuned, base))
    if new.family != old.family:
        raise ModelError(
            f"{tuned} is {new.family} and {base} is {old.family}; give the base that it was made of"
        )
    parts = empty_components(old, text=text_encoder)
    chosen = set(match_modules(parts, targets))
    modules: dict[str, LowRank] = {}
    energies = {"held": 0.0, "lost": 0.0, "outside": 0.0}
    done = 0
    for component in parts:
        for name, change in _changes(new.parts[component], old.parts[component], component):
            energy = float(change.double().square().sum())
            if name not in chosen:
                energies["outside"] += energy
                continue
            if energy:
                found = decompose_dense(change.flatten(1), rank, tuple(change.shape[1:]))
                held = min(float(found.values[:rank].double().square().sum()), energy)
                modules[name] = found.truncate(rank)
                energies["held"] += held
                energies["lost"] += energy - held
            done += 1
            if progress is not None:
                progress(done, len(chosen))
    if not modules:
        raise AdapterError(
            f"{tuned} changes nothing of {base} in {', '.join(targets)}; there is no LoRA in it"
        )
    inside = energies["held"] + energies["lost"]
    report = ExtractReport(
        num_modules=len(modules),
        num_unchanged=len(chosen) - len(modules),
        error=math.sqrt(energies["lost"] / inside),
        outside=energies["outside"] / (inside + energies["outside"]),
    )
    largest = max(pair.rank for pair in modules.values())
    return Adapter(modules, largest, float(largest), old.family, None, _notes(old, new)), report


def _notes(base: BaseInfo, tuned: BaseInfo) -> dict[str, str]:
    """What the file says."""
    return {
        "sdlora.base_name": base.name,
        "sdlora.base_digest": base.digest,
        "sdlora.extracted_from": tuned.name,
        "ss_sd_model_name": base.name,
        "ss_base_model_version": base.traits.kohya_version,
        "ss_v2": str(base.traits.kohya_v2),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{base.traits.architecture}/lora",
        "modelspec.title": f"{tuned.name} from {base.name}",
    }


def _changes(new: Part, old: Part, component: str) -> Iterator[tuple[str, Tensor]]:
    """What fine-tuning added to each tensor, fp32; a weight is called by its module.

    Raises:
        ModelError: If the two hold other tensors, or tensors of other sizes.
    """
    after, before = (
        {
            _module_of(component, name): (stored, shape)
            for stored, (name, shape) in stored_weights(part).items()
        }
        for part in (new, old)
    )
    if strange := [name for name in before if name not in after or after[name][1] != before[name][1]]:
        raise ModelError(
            f"{len(strange)} tensors of the {component}, such as {strange[0]}, are not in {new.files[0]}, or "
            "have other sizes there; give the base that it was made of, and both as diffusers folders"
        )
    orders = ({table[name][0]: name for name in before} for table in (after, before))
    pairs = zip(
        *(read_weights(part, order) for part, order in zip((new, old), orders, strict=True)), strict=True
    )
    for (name, one), (_, other) in pairs:
        if one.is_floating_point():
            # A smaller copy of the same weights differs by rounding, which is no change.
            rounded = other.to(one.dtype) if one.itemsize < other.itemsize else other
            yield name, one.float() - rounded.float()


def _module_of(component: str, name: str) -> str:
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
                if (module := _module_of(component, name)) in set(names)
            }
            norms |= {module: float(weight.double().norm()) for module, weight in read_weights(part, wanted)}
    return norms


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
        ModelError: If the place is taken, or is no place for this base.
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
    temporary = place.with_name(f".{place.name}.{os.getpid()}.tmp")
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
            f"--out {place} is already there; a base is never changed in place, so give another name"
        )
    if info.path.is_file() != (place.suffix == ".safetensors"):
        kind = (
            "one file, so give a .safetensors file" if info.path.is_file() else "a folder, so give a folder"
        )
        raise ModelError(f"--out {place} does not go with the base {info.name}, which is {kind}")


class _Change:
    """What adapters add to the tensors of a base, by component and name in its files."""

    def __init__(self, info: BaseInfo, adapters: Sequence[tuple[Adapter, float]]) -> None:
        self.adapters = adapters
        self.modules: dict[tuple[str, str], str] = {}
        names = {name for adapter, _ in adapters for name in adapter.modules}
        for component in {component_of(name) for name in names}:
            for stored, (name, _) in stored_weights(info.parts[component]).items():
                if (module := _module_of(component, name)) in names:
                    self.modules[component if info.path.is_dir() else "", stored] = module
        if missing := names - set(self.modules.values()):
            raise AdapterError(
                f"{len(missing)} modules, such as {min(missing)}, are fused with others in {info.path}; "
                "give the base as a diffusers folder"
            )

    def __call__(self, stored: str, tensor: Tensor, component: str = "") -> Tensor:
        """The tensor with every change of its module added, in fp64 where there is one."""
        module = self.modules.get((component, stored))
        if module is None:
            return tensor
        total = tensor.double()
        for adapter, strength in self.adapters:
            if pair := adapter.modules.get(module):
                up, down = pair.up.detach().double().flatten(1), pair.down.detach().double().flatten(1)
                total += (strength * adapter.scale_of(module) * (up @ down)).reshape(total.shape)
        return total


def _write_folder(info: BaseInfo, folder: Path, change: _Change, dtype: torch.dtype | None) -> None:
    """A whole diffusers folder: every part with plain file names, everything else as it was."""
    parts = {name: part for name, part in info.parts.items() if part.folder is not None}

    places = {info.path, *(part.folder for part in parts.values())}

    def left_out(path: str, names: list[str]) -> list[str]:
        is_rewritten = Path(path) in places
        return [n for n in names if n.endswith(PICKLES) or (is_rewritten and ".safetensors" in n)]

    shutil.copytree(info.path, folder, ignore=left_out)
    for name, part in parts.items():
        stem = "model" if name.startswith("text_encoder") else "diffusion_pytorch_model"
        rewrite(
            part.files,
            folder / name / f"{stem}.safetensors",
            partial(change, component=name),
            dtype,
        )
        _write_config(folder / name / "config.json", part.config, dtype)


def _write_config(path: Path, config: Mapping[str, object], dtype: torch.dtype | None) -> None:
    """The part's configuration, which may name the dtype that it is loaded in."""
    values = dict(config)
    for key in ("dtype", "torch_dtype"):
        if dtype is not None and key in values:
            values[key] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
