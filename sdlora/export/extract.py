"""The LoRA that is nearest to what fine-tuning changed in a base."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from sdlora.config import load_config
from sdlora.errors import AdapterError, ModelError
from sdlora.export.rewrite import module_of, read_weights, stored_weights
from sdlora.lora.adapter import Adapter
from sdlora.lora.attach import match_modules
from sdlora.lora.kinds import LowRank
from sdlora.models.components import Component
from sdlora.models.info import BaseInfo, inspect_base
from sdlora.models.weights import empty_components
from sdlora.rank.svd import decompose_dense

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
    """Approximates what fine-tuning changed in a base by a LoRA, module by module (truncated SVD).

    Args:
        tuned: The fine-tuned base: a diffusers folder, a hub id or a file.
        base: The base it was tuned from.
        rank: Of each module.
        targets: As `lora.targets`.
        text_encoder: Also the text encoders, which `targets` must name.
        progress: Called with (finished, total) modules.

    Raises:
        ModelError: If the two are of different families or sizes.
        AdapterError: If nothing was changed.
    """
    new, old = (inspect_base(load_config(None, {"base.source": str(one)}).base) for one in (tuned, base))
    if new.family != old.family:
        raise ModelError(
            f"{tuned} is {new.family} and {base} is {old.family}; use the base that it was fine-tuned from",
            key="base.family",
        )
    parts = empty_components(old, text=text_encoder)
    chosen = set(match_modules(parts, targets))
    modules: dict[str, LowRank] = {}
    energies = {"held": 0.0, "lost": 0.0, "outside": 0.0}
    done, show = 0, progress or (lambda finished, total: None)
    for component in parts:
        for name, change in _changes(new.components[component], old.components[component], component):
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
            show(done, len(chosen))
    if not modules:
        raise AdapterError(
            f"{tuned} does not differ from {base} in {', '.join(targets)}; there is nothing to extract"
        )
    inside = energies["held"] + energies["lost"]
    error, outside = math.sqrt(energies["lost"] / inside), energies["outside"] / sum(energies.values())
    largest = max(pair.rank for pair in modules.values())
    adapter = Adapter(modules, largest, float(largest), old.family, None, _notes(old, new))
    return adapter, ExtractReport(len(modules), len(chosen) - len(modules), error, outside)


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


def _changes(new: Component, old: Component, component: str) -> Iterator[tuple[str, Tensor]]:
    """What fine-tuning added to each tensor, fp32; a weight is called by its module.

    Raises:
        ModelError: If the two hold other tensors, or tensors of other sizes.
    """
    after, before = (
        {
            module_of(component, name): (stored, shape)
            for stored, (name, shape) in stored_weights(part).items()
        }
        for part in (new, old)
    )
    if strange := [name for name in before if name not in after or after[name][1] != before[name][1]]:
        raise ModelError(
            f"{len(strange)} tensors of the {component}, such as {strange[0]}, are not in {new.files[0]}, or "
            "have other sizes there; use the base that it was fine-tuned from, and diffusers folders for both"
        )
    orders = ({table[name][0]: name for name in before} for table in (after, before))
    pairs = zip(
        *(read_weights(part, order) for part, order in zip((new, old), orders, strict=True)), strict=True
    )
    for (name, one), (_, other) in pairs:
        if one.is_floating_point():
            # A smaller copy of the same weights differs by rounding, which does not count as a change.
            rounded = other.to(one.dtype) if one.itemsize < other.itemsize else other
            yield name, one.float() - rounded.float()
