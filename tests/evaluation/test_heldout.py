"""A loss that only the weights can change (R-12)."""

from __future__ import annotations

import pytest
import torch

from sdlora.diffusion.schedule import schedule_from_config
from sdlora.evaluation.heldout import HeldoutItem, heldout_loss
from sdlora.models.base import Condition
from sdlora.seeds import derive_seed

SCHEDULE = schedule_from_config({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012})
CPU = torch.device("cpu")


def make_items(*sizes: tuple[int, int]) -> list[HeldoutItem]:
    generator = torch.Generator().manual_seed(0)
    return [
        HeldoutItem(
            f"digest {n}",
            torch.randn(4, *size, generator=generator),
            Condition(torch.randn(8, 6, generator=generator)),
        )
        for n, size in enumerate(sizes)
    ]


def measure(items, denoise=lambda noisy, timesteps, condition: noisy * 0.5, batch_size=2):
    return heldout_loss(denoise, SCHEDULE, items, batch_size=batch_size, device=CPU)


def test_equal_twice_and_alone():
    """R-12: no ambient state, no order and no batch moves it."""
    items = make_items((8, 8), (8, 8), (6, 10), (8, 8), (6, 10))
    first = measure(items)
    torch.rand(5)
    assert measure(items) == first
    for other in (measure(items[::-1]), measure(items, batch_size=5)):
        assert other.loss == pytest.approx(first.loss, rel=1e-6)
    alone = [measure([item]).loss for item in items]
    assert sum(alone) / len(alone) == pytest.approx(first.loss, rel=1e-6)


def test_a_device_without_float64(without_doubles):
    """R-12: the same on MPS."""
    items = make_items((4, 4), (4, 4))

    def denoise(noisy, timesteps, condition):
        return without_doubles(noisy * 0.5)

    assert measure(items, denoise) == measure(items)


def test_by_hand():
    """R-12: the plain squared error at the middle of each band, with noise by key and timestep."""
    items = make_items((4, 4))
    measured = measure(items, lambda noisy, timesteps, condition: torch.zeros_like(noisy))
    expected = []
    for timestep in (100, 300, 500, 700, 900):
        generator = torch.Generator().manual_seed(derive_seed("heldout", "digest 0", timestep))
        expected.append(float(torch.randn(4, 4, 4, generator=generator).square().mean()))
    assert list(measured.by_band.values()) == pytest.approx(expected, rel=1e-5)
    assert measured.loss == pytest.approx(sum(expected) / 5, rel=1e-5)
    assert list(measured.by_band) == ["0-199", "200-399", "400-599", "600-799", "800-999"]


def test_captions_reach_the_network():
    """Each image gets its own text states."""
    items = make_items((4, 4), (4, 4))
    seen = []

    def denoise(noisy, timesteps, condition):
        seen.append(condition.hidden)
        return noisy

    measure(items, denoise)
    expected = torch.stack([item.condition.hidden for item in items])
    assert all(torch.equal(hidden, expected) for hidden in seen)
