"""Starting from another LoRA file: ranks grow exactly, and shrink to the nearest product."""

from __future__ import annotations

import pytest
import torch

from sdlora.errors import ConfigError
from sdlora.formats.files import load_adapter, save_adapter
from sdlora.lora.adapter import draw_adapter
from sdlora.lora.attach import match_targets
from sdlora.rank.resize import InitReport, check_init_targets, init_from_adapter
from tests.checks import raises


@pytest.fixture
def draw(unet):
    """A fresh adapter of a rank and scale."""

    def draw(rank, scale=1.0, targets=("attention",)):
        names = match_targets(unet, targets)
        return draw_adapter(unet, dict.fromkeys(names, rank), dict.fromkeys(names, scale), seed=5)

    return draw


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_larger_rank_is_exact_and_can_learn(unet, make_adapter, deltas, draw, scale):
    """The same change to the bit where no arithmetic is needed; the new directions get gradients."""
    start = make_adapter(unet, rank=3, alpha=3)
    adapter, fresh = draw(8, scale), draw(8)
    report = init_from_adapter(adapter, start)
    assert report == InitReport(num_kept=0, num_padded=32, num_truncated=0, num_fresh=0, error=0.0)
    for name, pair in adapter.modules.items():
        assert torch.equal(pair.down[:3], start.modules[name].down)
        assert torch.equal(pair.up[:, :3] * scale, start.modules[name].up)
        assert torch.equal(pair.down[3:], fresh.modules[name].down[3:])
        assert not pair.up[:, 3:].any()
    exact = deltas(start)
    assert all((delta - exact[name]).abs().max() < 1e-9 for name, delta in deltas(adapter).items())
    assert all(tensor.requires_grad for tensor in adapter.parameters())


def test_a_smaller_rank_is_the_nearest(unet, make_adapter, deltas, draw):
    """Eckart and Young: no product of that rank is nearer; the relative error is that of the whole."""
    start = make_adapter(unet, rank=6, alpha=3, targets=["all"])
    adapter = draw(2, 4.0, ["all"])
    report = init_from_adapter(adapter, start)
    lost = whole = 0.0
    for name, delta in deltas(adapter).items():
        exact = deltas(start)[name]
        left, values, right = torch.linalg.svd(exact, full_matrices=False)
        nearest = left[:, :2] @ torch.diag(values[:2]) @ right[:2]
        torch.testing.assert_close(delta, nearest, rtol=1e-4, atol=1e-6)
        lost += float((exact - delta).square().sum())
        whole += float(exact.square().sum())
    assert report.num_truncated == len(adapter.modules)
    assert report.error == pytest.approx((lost / whole) ** 0.5, rel=1e-4)
    assert f"{report.error:.2%}" in str(report)


def test_fewer_modules_leave_the_rest_fresh(unet, make_adapter, draw):
    """Modules that the file lacks start as in a new run, and are counted."""
    start = make_adapter(unet, rank=4, alpha=4, targets=["*.attn2.*"])
    adapter, fresh = draw(4), draw(4)
    assert init_from_adapter(adapter, start) == InitReport(16, 0, 0, 16, error=0.0)
    for name, pair in adapter.modules.items():
        expected = start.modules.get(name, fresh.modules[name])
        assert torch.equal(pair.down, expected.down)
        assert torch.equal(pair.up, expected.up)


def test_more_modules_are_refused(unet, make_adapter):
    """Leaving them out would be another start than the file."""
    start = make_adapter(unet, targets=["all"])
    with raises(ConfigError, "lora.targets", shows=("init = x", str(len(start.modules)))):
        check_init_targets(start, match_targets(unet, ["attention"]), "init = x")
    check_init_targets(make_adapter(unet), match_targets(unet, ["all"]), "init = x")


@pytest.mark.parametrize("dialect", ["diffusers", "kohya"])
def test_from_a_file_of_any_dialect(tmp_path, unet, make_adapter, deltas, draw, dialect):
    """R-02: a file whose modules differ in rank and that was trained with another alpha."""
    trained = make_adapter(unet, rank=4, alpha=3)
    path = save_adapter(tmp_path / "x.safetensors", trained, dialect=dialect)
    adapter = draw(6, 0.25)
    init_from_adapter(adapter, load_adapter(path))
    exact = deltas(trained)
    for name, delta in deltas(adapter).items():
        torch.testing.assert_close(delta, exact[name], rtol=1e-5, atol=1e-8)
