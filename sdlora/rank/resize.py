"""An adapter at another rank: reduced by a rule or to a file size, or copied into a fresh adapter."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import NamedTuple

import torch

from sdlora.dtypes import DTYPES
from sdlora.errors import AdapterError, ConfigError
from sdlora.formats.files import AnyAdapter, open_adapter
from sdlora.formats.keys import Dialect
from sdlora.lora.adapter import Adapter, low_rank_modules
from sdlora.lora.layers import DENOISER, component_of
from sdlora.rank.spectrum import Spectrum, decompose, spectrum


@dataclass(frozen=True)
class ResizeReport:
    """Size and error of a resized adapter.

    Args:
        rule: The rule with its value, such as `energy 0.99`.
        ranks: Rank by module; 0 for dropped modules.
        error: Norm of the difference over the norm of the whole change.
        worst: The module with the largest relative error, and that error.
        before: Number of parameters before; `after`, that after.
    """

    rule: str
    ranks: dict[str, int]
    error: float
    worst: tuple[str, float]
    before: int
    after: int

    def lines(self) -> list[str]:
        counts = Counter(self.ranks.values())
        dropped = counts.pop(0, 0)
        ranks = ", ".join(f"{rank} ({count} modules)" for rank, count in sorted(counts.items())[:8])
        more = f" and {len(counts) - 8} more ranks" if len(counts) > 8 else ""
        left_out = f"; {dropped} modules dropped" if dropped else ""
        size = f"{self.before:,} parameters -> {self.after:,} ({self.after / self.before:.0%})"
        return [
            f"resized   {self.rule}: {size}",
            f"rank      {ranks}{more}{left_out}",
            describe_error(self.error, self.worst),
        ]


def describe_error(error: float, worst: tuple[str, float]) -> str:
    return f"error     {error:.2%} of the whole change, at most {worst[1]:.2%} of a module ({worst[0]})"


RULES = {
    "rank": "1 or more",
    "energy": "a share such as 0.99",
    "ratio": "a share such as 0.05",
    "score": "a share such as 0.003",
    "size_mb": "megabytes such as 8",
}


def resize(
    adapter: AnyAdapter,
    *,
    base_norms: Mapping[str, float] | None = None,
    precision: str = "fp16",
    dialect: Dialect = "diffusers",
    **rules: float | None,
) -> tuple[Adapter, ResizeReport]:
    """Truncates each module to a rank of its own, chosen by exactly one rule.

    Args:
        adapter: The adapter, which is not changed; or a LoRA file, a run or a tree node.
        base_norms: Frobenius norm of each module's base weight, for `score`.
        precision: Precision of the file, for `size_mb`.
        dialect: Dialect of the file, for `size_mb`: kohya files have one rank for all modules.
        rules: `rank`, the largest rank of a module; `energy`, the share of the sum of squared singular values
            to keep in each module; `ratio`, the smallest singular value to keep, as a share of the module's
            largest (the inverse of kohya's `sv_ratio`); `score`, the same as a share of the norm of the base
            weight, which drops modules that hardly change the base; or `size_mb`, the size of the file.

    Returns:
        The adapter, alpha == rank, fp32; and its error.

    Raises:
        ConfigError: If none or several rules are given, or a value is out of range.
        AdapterError: If no module would be left, or modules are not low-rank pairs.
    """
    rule, value = _find_rule(rules)
    adapter = open_adapter(adapter)
    values = spectrum(adapter)
    if rule == "size_mb":
        budget = value * 1e6 - _header_bytes(adapter)
        ranks = _ranks_for_size(adapter, values, budget / DTYPES[precision].itemsize, dialect)
    else:
        ranks = _ranks_by_rule(values, rule, value, base_norms)
    if not any(ranks.values()):
        remedy = "a larger value" if rule in ("energy", "size_mb") else "a smaller value"
        problem = f"{rule} = {value:g} would drop every module; use {remedy}"
        raise AdapterError(problem, key="resize.nothing-left")
    modules = {
        name: decompose(pair, adapter.scale_of(name)).truncate(ranks[name])
        for name, pair in low_rank_modules(adapter, "resize").items()
        if ranks[name]
    }
    largest, error = max(ranks.values()), values.error(ranks)
    notes = {key: text for key, text in adapter.notes.items() if key != "sdlora.heldout_loss"}
    notes["sdlora.resized"] = f"from rank {adapter.rank} by {rule} {value:g}, error {error:.2e}"
    small = replace(adapter, modules=modules, rank=largest, alpha=float(largest), scales={}, notes=notes)
    worst = max(((name, values.error({name: rank})) for name, rank in ranks.items()), key=itemgetter(1))
    before, after = adapter.num_parameters, small.num_parameters
    return small, ResizeReport(f"{rule} {value:g}", ranks, error, worst, before, after)


def _find_rule(rules: Mapping[str, float | None]) -> tuple[str, float]:
    given = {name: float(value) for name, value in rules.items() if value is not None}
    if len(given) != 1 or not given.keys() <= RULES.keys():
        found = " and ".join(f"{name} = {value:g}" for name, value in given.items()) or "none"
        raise ConfigError(f"pass exactly one of {', '.join(RULES)}, not {found}", key="resize.one-rule")
    rule, value = given.popitem()
    # NaN is out of range.
    if not 0 < value <= (1 if rule in ("energy", "ratio") else math.inf):
        raise ConfigError(f"{rule} = {value:g} is out of range; use {RULES[rule]}", key="resize.range")
    return rule, value


def _ranks_by_rule(
    found: Spectrum, rule: str, value: float, base_norms: Mapping[str, float] | None
) -> dict[str, int]:
    """The rank of each module; 0 drops it."""
    if rule == "rank":
        return {name: min(int(value), found.numerical_rank(name)) for name in found.values}
    if rule == "energy":
        return {name: found.rank_for_energy(name, value) for name in found.values}
    if rule == "ratio":
        kept = {name: (row >= value * row[0]) & (row > 0) for name, row in found.values.items()}
        return {name: int(row.sum()) for name, row in kept.items()}
    missing = [name for name in found.values if name not in (base_norms or {})]
    if base_norms is None or missing:
        message = f"score requires the base's weights ({len(missing)} modules are missing); pass --base"
        raise ConfigError(message, key="resize.score-without-base")
    return {name: int((values >= value * base_norms[name]).sum()) for name, values in found.values.items()}


def _ranks_for_size(adapter: Adapter, found: Spectrum, budget: float, dialect: Dialect) -> dict[str, int]:
    """Fills a budget of parameters with the singular values that have the most energy per parameter."""
    costs = {name: module.num_parameters // module.rank for name, module in adapter.modules.items()}
    if dialect == "kohya":
        rank = int(budget // sum(costs.values()))
        return {name: min(rank, found.numerical_rank(name)) for name in found.values}
    gains = [
        (float(value) ** 2 / costs[name], name)
        for name, values in found.values.items()
        for value in values[: found.numerical_rank(name)]
    ]
    ranks = dict.fromkeys(found.values, 0)
    for _, name in sorted(gains, reverse=True):
        if costs[name] <= budget:
            budget -= costs[name]
            ranks[name] += 1
    return ranks


def _header_bytes(adapter: Adapter) -> int:
    """An upper bound of the header's size."""
    names = sum(5 * len(name) + 300 for name in adapter.modules)
    return names + sum(len(key) + len(text.encode()) + 6 for key, text in adapter.notes.items()) + 1024


class InitReport(NamedTuple):
    """Numbers of modules by how they were initialized, and the error of truncation.

    `error` is the norm of the truncated part over the norm of the whole change.
    """

    num_kept: int
    num_padded: int
    num_truncated: int
    num_fresh: int
    error: float

    def __str__(self) -> str:
        parts = {
            "modules copied": self.num_kept,
            "padded to a larger rank (exact)": self.num_padded,
            f"truncated to a smaller rank (error {self.error:.2%} of the whole change)": self.num_truncated,
            "not in the file (fresh)": self.num_fresh,
        }
        return ", ".join(f"{number} {text}" for text, number in parts.items() if number)


def check_init_targets(start: Adapter, targets: Collection[str], source: str) -> None:
    """Raises a ConfigError if an adapter, called `source`, has modules that are not trained."""
    if left_out := [name for name in start.modules if name not in targets]:
        has_text = any(component_of(name) != DENOISER for name in left_out)
        text = "lora.text_encoder=true and " if has_text else ""
        raise ConfigError(
            f"{source} has {len(left_out)} of its {len(start.modules)} modules outside lora.targets, such as "
            f"{left_out[0]}; set {text}lora.targets to include them",
            key="lora.targets",
        )


@torch.no_grad()
def init_from_adapter(adapter: Adapter, start: Adapter) -> InitReport:
    """Copies the change of another adapter into a fresh one, module by module.

    With a larger rank, the further rows of `down` stay as drawn, and the columns of `up` zero: the change is
    the same, and the new directions can learn. With a smaller rank, a module gets the nearest product.
    Modules that `start`, checked by `check_init_targets`, lacks stay fresh.
    """
    padded, truncated, lost, whole = 0, 0, 0.0, 0.0
    fresh_pairs = low_rank_modules(adapter, "lora.init_from")
    for name, pair in low_rank_modules(start, "lora.init_from").items():
        own, scale = fresh_pairs[name], start.scale_of(name)
        pair = pair.with_kernel(own.down.ndim == 4)
        whole += scale**2 * pair.norm_squared()
        if pair.rank > own.rank:
            found = decompose(pair)
            lost += scale**2 * float(found.values[own.rank :].square().sum())
            pair = found.truncate(own.rank)
            truncated += 1
        elif pair.rank < own.rank:
            padded += 1
        own.down[: pair.rank] = pair.down.to(own.down)
        own.up[:, : pair.rank] = (pair.up * (scale / adapter.scale_of(name))).to(own.up)
    kept, fresh = len(start.modules) - padded - truncated, len(adapter.modules) - len(start.modules)
    return InitReport(kept, padded, truncated, fresh, math.sqrt(lost / whole) if lost else 0.0)
