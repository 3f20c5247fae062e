"""Singular values of an adapter, by module and by block: how much of its rank it uses.

K singular values of a module (at most its rank).
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from sdlora.formats.files import AnyAdapter, open_adapter
from sdlora.lora.adapter import low_rank_modules
from sdlora.lora.layers import TEXT_ENCODERS
from sdlora.rank.svd import singular_values

SHARES = (0.5, 0.9, 0.99)
# Share of the largest value; smaller values are rounding errors of the decomposition, and lost in fp16.
ROUNDING = 1e-6


@dataclass(frozen=True, slots=True)
class BlockSpectrum:
    """Averages over the modules of a block, its largest rank, and its share of the adapter's energy.

    `ranks_for_energy` are the numbers of singular values with 50, 90 and 99 % of a module's energy.
    """

    block: str
    num_modules: int
    rank: int
    effective_rank: float
    ranks_for_energy: tuple[float, ...]
    energy: float


@dataclass(frozen=True)
class Spectrum:
    """The singular values of every module's change.

    Energy is the sum of their squares: the squared Frobenius norm of the change.

    Args:
        values: By module, (K,) float64, largest first.
    """

    values: dict[str, Tensor]

    def effective_rank(self, name: str) -> float:
        """exp of the entropy of the normalised singular values (Roy and Vetterli 2007); 0 for no change."""
        values = self.values[name]
        total = float(values.sum())
        shares = values[values > 0] / total if total > 0 else values[:0]
        return float((-(shares * shares.log()).sum()).exp()) if len(shares) else 0.0

    def rank_for_energy(self, name: str, share: float) -> int:
        """The smallest rank with at least this share of the module's energy."""
        cumulated = self.values[name].square().cumsum(0)
        if not len(cumulated) or not cumulated[-1] > 0:
            return 0
        # Rounding must not push a share of 1 past the last value.
        return min(int((cumulated < share * cumulated[-1]).sum()) + 1, int((self.values[name] > 0).sum()))

    def numerical_rank(self, name: str) -> int:
        """The number of singular values above rounding; 0 for no change."""
        values = self.values[name]
        return int((values > ROUNDING * values.max()).sum())

    def error(self, ranks: Mapping[str, int]) -> float:
        """The error of truncating modules to ranks: norm of the difference over that of their change."""
        lost = sum(float(self.values[name][rank:].square().sum()) for name, rank in ranks.items())
        whole = sum(float(self.values[name].square().sum()) for name in ranks)
        return math.sqrt(lost / whole) if whole > 0 else 0.0

    def blocks(self) -> list[BlockSpectrum]:
        """Averages by block, in the order of the network."""
        groups: dict[str, list[str]] = defaultdict(list)
        for name in self.values:
            groups[block_of(name)].append(name)
        energies = {name: float(values.square().sum()) for name, values in self.values.items()}
        whole = sum(energies.values()) or 1.0
        return [
            BlockSpectrum(
                block,
                len(names := groups[block]),
                max(len(self.values[name]) for name in names),
                sum(self.effective_rank(name) for name in names) / len(names),
                tuple(sum(self.rank_for_energy(name, s) for name in names) / len(names) for s in SHARES),
                sum(energies[name] for name in names) / whole,
            )
            for block in sorted(groups, key=_block_order)
        ]


def block_of(module: str) -> str:
    """The block of a module: `down_blocks.1`, `mid_block`, `up_blocks.2`, or the text encoder's name."""
    if module.startswith(TEXT_ENCODERS):
        return module.partition(".")[0]
    found = re.match(r"(?:down|up)_blocks\.\d+|mid_block", module)
    return found[0] if found else module.partition(".")[0]


def _block_order(block: str) -> tuple[int, str]:
    order = ("text_encoder", "down_blocks", "mid_block", "up_blocks")
    return next((n for n, start in enumerate(order) if block.startswith(start)), len(order)), block


def spectrum(adapter: AnyAdapter) -> Spectrum:
    """The singular values of every module's change, scale included; of an adapter, a file or a run."""
    adapter = open_adapter(adapter)
    pairs = low_rank_modules(adapter, "spectrum")
    return Spectrum({name: singular_values(pair, adapter.scale_of(name)) for name, pair in pairs.items()})
