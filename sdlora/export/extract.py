"""The LoRA that is closest to the change of a base by fine-tuning."""

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
from sdlora.rank.spectrum import decompose_dense

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ExtractReport:
    """The accuracy of an extracted LoRA.

    `num_unchanged` counts the target modules that fine-tuning did not change; `error` is the norm of the
    targets' change beyond the rank over the norm of all their change; `outside` is the share of the whole
    energy that is outside of the targets: in other modules, norms, biases.
    """

    num_modules: int
    num_unchanged: int
    error: float
    outside: float

    def lines(self) -> list[str]:
        unchanged = f", {self.num_unchanged} were not changed" if self.num_unchanged else ""
        return [
            f"extracted {self.num_modules} modules{unchanged}; error {self.error:.2%} of their change",
            f"outside   {self.outside:.2%} of the energy of the whole change is outside of lora.targets",
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
    """Approximates the change of a base by fine-tuning with a LoRA, module by module (truncated SVD).

    Args:
        tuned: The fine-tuned base: a diffusers folder, a hub id or a file.
        base: The base it was tuned from.
        rank: Of each module.
        targets: As `lora.targets`; with `text_encoder`, also of text encoders.
        progress: Called with (finished, total) modules.

    Raises:
        ModelError: If the two are of different families or sizes.
        AdapterError: If the targets were not changed.
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
    inside = lost = outside = 0.0
    done = 0
    for component in parts:
        for name, change in _changes(new.components[component], old.components[component], component):
            energy = float(change.double().square().sum())
            if name not in chosen:
                outside += energy
                continue
            if energy:
                found = decompose_dense(change.flatten(1), rank, tuple(change.shape[1:]))
                modules[name] = found.truncate(rank)
                inside += energy
                lost += max(energy - float(found.values[:rank].double().square().sum()), 0.0)
            done += 1
            if progress:
                progress(done, len(chosen))
    if not modules:
        problem = (
            f"{tuned} does not differ from {base} in {', '.join(targets)}; use another model or --targets"
        )
        raise AdapterError(problem, key="extract.no-change")
    largest = max(module.rank for module in modules.values())
    adapter = Adapter(modules, largest, float(largest), old.family, None, _notes(old, new))
    error, share = math.sqrt(lost / inside), outside / (inside + outside)
    return adapter, ExtractReport(len(modules), len(chosen) - len(modules), error, share)


def _notes(base: BaseInfo, tuned: BaseInfo) -> dict[str, str]:
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
    """The change of each tensor, fp32, weights by module; raises a ModelError if names or shapes differ."""
    after, before = (
        {module_of(component, name): (key, shape) for key, (name, shape) in stored_weights(part).items()}
        for part in (new, old)
    )
    if strange := [name for name in before if name not in after or after[name][1] != before[name][1]]:
        raise ModelError(
            f"{len(strange)} tensors of the {component}, such as {strange[0]}, are not in {new.files[0]}, or "
            "have other sizes there; use the base it was fine-tuned from, and diffusers folders for both",
            key="extract.other-base",
        )
    tuned = read_weights(new, {after[name][0]: name for name in before})
    base = read_weights(old, {before[name][0]: name for name in before})
    for (name, one), (_, other) in zip(tuned, base, strict=True):
        if one.is_floating_point():
            # A smaller copy of the same weights differs by rounding, which does not count as a change.
            rounded = other.to(one.dtype) if one.itemsize < other.itemsize else other
            yield name, one.float() - rounded.float()
