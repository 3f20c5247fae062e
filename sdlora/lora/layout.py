"""Rank and alpha of each module of a fresh adapter, by name pattern."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from sdlora.config import LoraSection
from sdlora.errors import ConfigError
from sdlora.lora.attach import match_names

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Layout:
    """Ranks and alphas by module, in the order of the network, and the adapter kind.

    With `rslora`, scales are `alpha / sqrt(rank)` (rank-stabilised LoRA, arXiv 2312.03732, equation 4) in
    place of `alpha / rank`.
    """

    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    rslora: bool = False
    kind: str = "lora"

    def scales(self) -> dict[str, float]:
        return {
            name: self.alphas[name] / (math.sqrt(rank) if self.rslora else rank)
            for name, rank in self.ranks.items()
        }

    def describe(self) -> str:
        """For the plan: `rank 16, alpha 16, scale 1`."""
        scales = list(self.scales().values())
        same = all(self.alphas[name] == rank for name, rank in self.ranks.items())
        alpha = "= rank" if same and len(set(self.ranks.values())) > 1 else _span(list(self.alphas.values()))
        how = " (alpha / sqrt(rank))" if self.rslora else ""
        kind = "" if self.kind == "lora" else f"{self.kind}, "
        return f"{kind}rank {_counts(list(self.ranks.values()))}, alpha {alpha}, scale {_span(scales)}{how}"


def plan_layout(lora: LoraSection, names: Sequence[str]) -> Layout:
    """The layout of the target modules.

    A module's rank is that of the last match in `lora.rank_pattern`, else `lora.rank`; its alpha that of the
    last match in `lora.alpha_pattern`, else `lora.alpha`, else its rank. Raises a ConfigError with one line
    for each pattern that matches no target module.
    """
    problems: list[str] = []
    ranks = dict.fromkeys(names, lora.rank) | _by_pattern("rank_pattern", lora.rank_pattern, names, problems)
    alphas = {name: float(rank if lora.alpha is None else lora.alpha) for name, rank in ranks.items()}
    alphas |= _by_pattern("alpha_pattern", lora.alpha_pattern, names, problems)
    if problems:
        raise ConfigError(*problems)
    return Layout(ranks, alphas, lora.rslora, lora.kind)


def _by_pattern(
    key: str, patterns: Mapping[str, Number], names: Sequence[str], problems: list[str]
) -> dict[str, Number]:
    """The number of each module that a pattern matches; a pattern without a match is added to `problems`."""
    numbers: dict[str, Number] = {}
    for pattern, number in patterns.items():
        found = match_names(names, pattern)
        numbers |= dict.fromkeys(found, number)
        if not found:
            problems.append(
                f"lora.{key}: {pattern!r} matches none of the {len(names)} modules of lora.targets, such as "
                f"{names[0]}; use a target such as convolutions or a pattern such as *.attn2.*"
            )
    return numbers


def _counts(ranks: Sequence[int]) -> str:
    """`16`, or `32 (8 modules), 4 (120)`."""
    counts = Counter(ranks).most_common()
    if len(counts) == 1:
        return str(counts[0][0])
    first, *others = [f"{rank} ({count})" for rank, count in counts]
    return ", ".join([first.replace(")", " modules)"), *others])


def _span(numbers: Sequence[float]) -> str:
    """`1`, or `0.5 to 2`."""
    low, high = min(numbers), max(numbers)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
