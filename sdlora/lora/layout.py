"""What each module of a fresh adapter is like: its rank and alpha, by name pattern."""

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
    """Ranks and alphas by module, in the order of the network.

    Args:
        ranks: R of each module.
        alphas: Alpha of each module.
        rslora: Whether scales are `alpha / sqrt(rank)` (rank-stabilised LoRA, arXiv 2312.03732, equation 4)
            in place of `alpha / rank`.
        kind: Of `adapter.KINDS`.
    """

    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    rslora: bool = False
    kind: str = "lora"

    def scales(self) -> dict[str, float]:
        """The factor on the product of each module."""
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
    """The layout that the settings ask for.

    A module's rank is that of the last of `lora.rank_pattern` that matches, else `lora.rank`; its alpha that
    of the last of `lora.alpha_pattern`, else `lora.alpha`, else its rank.

    Args:
        lora: The settings.
        names: The target modules.

    Raises:
        ConfigError: With one line for each pattern that matches no target module.
    """
    problems: list[str] = []
    ranks = _by_pattern(lora.rank_pattern, names, "lora.rank_pattern", problems)
    alphas = _by_pattern(lora.alpha_pattern, names, "lora.alpha_pattern", problems)
    if problems:
        raise ConfigError(*problems)
    all_ranks = {name: ranks.get(name, lora.rank) for name in names}
    return Layout(
        all_ranks,
        {
            name: float(alphas.get(name, rank if lora.alpha is None else lora.alpha))
            for name, rank in all_ranks.items()
        },
        lora.rslora,
        lora.kind,
    )


def _by_pattern(
    patterns: Mapping[str, Number], names: Sequence[str], key: str, problems: list[str]
) -> dict[str, Number]:
    """The number of each module that a pattern matches; those that match nothing become problems."""
    numbers: dict[str, Number] = {}
    for pattern, number in patterns.items():
        found = match_names(names, pattern)
        numbers |= dict.fromkeys(found, number)
        if not found:
            problems.append(
                f"{key}: {pattern!r} matches none of the {len(names)} modules that lora.targets gives, such "
                f"as {names[0]}; use a target such as convolutions or a pattern such as *.attn2.*"
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
