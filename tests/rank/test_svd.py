"""Singular values and nearest pairs, against the dense matrix in float64."""

from __future__ import annotations

import pytest
import torch

from sdlora.rank.spectrum import LARGEST_EXACT_SIDE, decompose, decompose_dense, singular_values


def product(pair):
    return pair.up.double().flatten(1) @ pair.down.double().flatten(1)


def test_values_are_those_of_the_dense_change(uneven, deltas):
    """R-33: through the QR of the factors as by a dense SVD in fp64, convolutions included."""
    for name, change in deltas(uneven).items():
        found = singular_values(uneven.modules[name], uneven.scale_of(name))
        expected = torch.linalg.svdvals(change)[: len(found)]
        assert found == pytest.approx(expected, abs=1e-5 * float(expected[0])), name


@pytest.mark.parametrize("rank", [1, 3, 70])
def test_truncation_is_the_nearest_pair(rank, unet, make_adapter, deltas):
    """No pair of the rank is nearer (Eckart and Young); a rank above 64 works in fp32."""
    targets = ["attention", "feed_forward", "projections", "convolutions"]
    adapter = make_adapter(unet, rank=max(rank, 6), alpha=3, targets=targets)
    for name, change in deltas(adapter).items():
        pair = adapter.modules[name]
        small = decompose(pair, adapter.scale_of(name)).truncate(rank)
        left, values, right = torch.linalg.svd(change, full_matrices=False)
        expected = (left[:, :rank] * values[:rank]) @ right[:rank]
        assert float((product(small) - expected).abs().max()) < 1e-5 * float(values[0]), name
        assert small.rank == min(rank, *change.shape)
        assert small.down.shape[1:] == pair.down.shape[1:]
        assert small.up.ndim == pair.up.ndim


def test_small_dense_changes_are_decomposed_exactly():
    """As the dense SVD in fp64."""
    change = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    found = decompose_dense(change, 4, (30,)).truncate(4)
    left, values, right = torch.linalg.svd(change.double(), full_matrices=False)
    assert float((product(found) - (left[:, :4] * values[:4]) @ right[:4]).abs().max()) < 1e-5


def test_large_dense_changes_lose_little_more_than_must_be(make_pair):
    """The same result each time, and an error within 0.1 % of the least possible one, noise included."""
    side = LARGEST_EXACT_SIDE + 88
    noise = torch.randn(side, side, generator=torch.Generator().manual_seed(3)) * 0.002
    pair = make_pair([2.0 / (n + 1) for n in range(20)], size=(side, side))
    change = pair.up @ pair.down + noise
    torch.manual_seed(1)
    found = decompose_dense(change, 12, (side,)).truncate(12)
    torch.manual_seed(2)
    again = decompose_dense(change, 12, (side,)).truncate(12)
    assert torch.equal(found.up, again.up)
    least = float(torch.linalg.svdvals(change.double())[12:].norm())
    assert float((product(found) - change).norm()) < 1.001 * least
