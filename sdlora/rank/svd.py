"""Singular value decomposition of a module's change, and the nearest pair of a smaller rank.

R rank, K singular values of a module (at most R). A change `up @ down` is decomposed through the QR of its
two factors: only an (R, R) matrix is decomposed, and the dense one is never formed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sdlora.lora.kinds import LowRank

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
