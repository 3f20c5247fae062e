"""Singular values of an adapter, by module and by block, and the nearest pair of a smaller rank.

R rank, K singular values of a module (at most R). A change `up @ down` is decomposed through the QR of its
two factors: only an (R, R) matrix is decomposed, and the dense one is never formed.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sdlora.formats.files import AnyAdapter, open_adapter
from sdlora.lora.adapter import low_rank_modules
from sdlora.lora.kinds import LowRank
from sdlora.lora.layers import TEXT_ENCODERS

# Above this rank float64 takes minutes for an SDXL file, and float32 (1e-6) is still far finer than fp16.
LARGEST_EXACT_RANK = 64
LARGEST_EXACT_SIDE = 512
OVERSAMPLING, ITERATIONS = 16, 3


@dataclass(frozen=True, slots=True)
class Decomposition:
    """The singular value decomposition of one module's change."""

    left: Tensor
    """(out, K), orthonormal columns."""
    values: Tensor
    """(K,), largest first."""
    right: Tensor
    """(K, in), or (K, in * kh * kw) for a convolution; orthonormal rows."""
    kernel: tuple[int, ...]
    """The shape of `down` after its rank."""

    def truncate(self, rank: int) -> LowRank:
        """The nearest pair of a rank (Eckart and Young 1936), fp32; each factor takes roots of the values."""
        roots = self.values[:rank].sqrt()
        down, up = roots[:, None] * self.right[:rank], self.left[:, :rank] * roots
        ones = (1, 1) if len(self.kernel) == 3 else ()
        return LowRank(
            down.reshape(-1, *self.kernel).float().contiguous(),
            up.reshape(*up.shape, *ones).float().contiguous(),
        )


def _factors(pair: LowRank) -> tuple[Tensor, Tensor]:
    """`up` (out, R) and `down` (R, in * kh * kw) in the working dtype."""
    dtype = torch.float64 if pair.rank <= LARGEST_EXACT_RANK else torch.float32
    return pair.up.detach().to(dtype).flatten(1), pair.down.detach().to(dtype).flatten(1)


def decompose(pair: LowRank, scale: float = 1.0) -> Decomposition:
    """The singular value decomposition of `scale * up @ down`."""
    up, down = _factors(pair)
    left, core_left = torch.linalg.qr(up)
    right, core_right = torch.linalg.qr(down.T)
    u, values, vh = torch.linalg.svd(scale * core_left @ core_right.T, full_matrices=False)
    return Decomposition(left @ u, values, vh @ right.T, tuple(pair.down.shape[1:]))


def singular_values(pair: LowRank, scale: float = 1.0) -> Tensor:
    """(K,) singular values of `scale * up @ down`, largest first, float64."""
    up, down = _factors(pair)
    core_left, core_right = torch.linalg.qr(up, mode="r").R, torch.linalg.qr(down.T, mode="r").R
    values: Tensor = torch.linalg.svdvals(scale * core_left @ core_right.T)
    return values.double().cpu()


def decompose_dense(change: Tensor, rank: int, kernel: tuple[int, ...]) -> Decomposition:
    """The largest singular values, at least `rank` of them, of a dense change (out, in * kh * kw).

    Exact for small matrices, else by subspace iteration from a fixed start (Halko et al. 2011, algorithm
    4.4): exact decompositions of all modules of SDXL would take an hour. `kernel` is the shape of the
    module's `down` after its rank.
    """
    side, width = min(change.shape), rank + OVERSAMPLING
    if side <= max(width, LARGEST_EXACT_SIDE):
        left, values, right = torch.linalg.svd(change.double(), full_matrices=False)
        return Decomposition(left, values, right, kernel)
    change = change.float()
    generator = torch.Generator().manual_seed(0)
    basis = change @ torch.randn(change.shape[1], width, generator=generator).to(change)
    for _ in range(ITERATIONS):
        basis = change @ torch.linalg.qr(change.T @ torch.linalg.qr(basis).Q).Q
    basis = torch.linalg.qr(basis).Q
    left, values, right = torch.linalg.svd(basis.T @ change, full_matrices=False)
    return Decomposition(basis @ left, values, right, kernel)


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
    """

    values: dict[str, Tensor]
    """By module, (K,) float64, largest first."""

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
