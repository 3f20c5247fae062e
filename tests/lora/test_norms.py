"""The limit on how far modules are changed."""

from __future__ import annotations

import pytest
import torch

from sdlora.lora.adapter import limit_norms


def test_norms_are_limited_in_place(unet, make_adapter, deltas):
    """Modules above the limit come down to it and keep their direction; the others are left alone."""
    adapter = make_adapter(unet, targets=["all"], alpha=3)
    first = next(iter(adapter.modules))
    adapter.scales = {first: 5.0}
    before = deltas(adapter)
    norms = torch.tensor([float(delta.norm()) for delta in before.values()])
    limit = float(norms.median())
    untouched = {name: pair.up.detach().clone() for name, pair in adapter.modules.items()}
    report = limit_norms(adapter, limit)
    after = deltas(adapter)
    for name, delta in after.items():
        norm = float(before[name].norm())
        torch.testing.assert_close(delta, before[name] * min(1, limit / norm), rtol=1e-4, atol=1e-8)
        if norm < limit:
            assert torch.equal(adapter.modules[name].up, untouched[name])
    assert report.num_limited == int((norms > limit).sum()) > 0
    assert report.largest == pytest.approx(limit, rel=1e-5)
    assert report.mean == pytest.approx(float(norms.clamp(max=limit).mean()), rel=1e-5)
    assert limit_norms(adapter, 2 * limit).num_limited == 0
    assert all(tensor.requires_grad for tensor in adapter.parameters())


def test_a_fresh_adapter_has_no_norm(unet, make_adapter):
    """Up matrices of zero are no reason for a division by zero."""
    adapter = make_adapter(unet, size=0)
    report = limit_norms(adapter, 1.0)
    assert (report.num_limited, report.largest) == (0, 0.0)
    assert all(torch.isfinite(tensor).all() for tensor in adapter.parameters())
