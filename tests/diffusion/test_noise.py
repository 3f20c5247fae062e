"""Offset, pyramid and perturbation of the noise (R-04, R-32)."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from sdlora.config import ObjectiveSection
from sdlora.diffusion.objective import add_pyramid, draw_noise, perturb

SHAPE = torch.Size((4, 24, 16))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_offset_by_hand():
    """objective.noise_offset: ε + s ξ, ξ one number for each channel."""
    draws = generator()
    noise, shift = torch.randn(SHAPE, generator=draws), torch.randn(4, generator=draws)
    found = draw_noise(SHAPE, ObjectiveSection(noise_offset=0.3), generator())
    for channel in range(4):
        torch.testing.assert_close(found[channel], noise[channel] + 0.3 * float(shift[channel]))


def test_pyramid_by_hand():
    """objective.pyramid_noise: (ε + Σ dⁱ up(ε_i)) / std, level by level from the same generator."""
    noise = torch.randn(SHAPE, generator=generator(1))
    draws = generator(2)
    expected = noise.double()
    for level in range(3):
        ratio = (2 + 2 * torch.rand((), generator=draws).item()) ** level
        height, width = int(24 / ratio), int(16 / ratio)
        coarse = torch.randn((1, 4, max(height, 1), max(width, 1)), generator=draws).double()
        expected = expected + 0.5**level * functional.interpolate(coarse, (24, 16), mode="bilinear")[0]
    found = add_pyramid(noise, 3, 0.5, generator(2))
    torch.testing.assert_close(found.double(), expected / expected.std(), rtol=1e-5, atol=1e-6)


def test_pyramid_ends_at_one_pixel():
    """More levels than the size has draw nothing more."""
    noise = torch.randn((4, 8, 8), generator=generator(1))
    assert torch.equal(add_pyramid(noise, 9, 0.5, generator()), add_pyramid(noise, 10, 0.5, generator()))


def test_pyramid_has_unit_variance_and_more_low_frequencies():
    """The forward process stays variance preserving; what grows is the noise of whole areas."""
    settings = ObjectiveSection(pyramid_noise=6, pyramid_discount=0.5)
    plain, pyramid = (
        torch.stack([draw_noise(SHAPE, one, generator(seed)) for seed in range(200)])
        for one in (ObjectiveSection(), settings)
    )
    assert float(pyramid.std()) == pytest.approx(1, abs=0.01)
    means = [float(noise.mean(dim=(2, 3)).std()) for noise in (plain, pyramid)]
    assert means[0] == pytest.approx((24 * 16) ** -0.5, rel=0.1)
    assert means[1] > 2 * means[0]


def test_perturbation():
    """objective.input_perturbation: ε + γ ξ, ξ white and independent of ε; 0 draws nothing."""
    noise = torch.randn((4, 64, 64), generator=generator(1))
    extra = (perturb(noise, 0.1, generator()) - noise) / 0.1
    torch.testing.assert_close(extra, torch.randn(noise.shape, generator=generator()), rtol=1e-3, atol=1e-4)
    draws = generator()
    assert torch.equal(perturb(noise, 0.0, draws), noise)
    assert torch.equal(draws.get_state(), generator().get_state())
