"""Adapters as data: initialisation, copies, and the base they belong to."""

from __future__ import annotations

import pytest
import torch

from sdlora.errors import AdapterError
from sdlora.lora.adapter import check_base, draw_adapter
from sdlora.lora.attach import match_targets, mount
from sdlora.lora.kinds import LowRank
from tests.checks import raises
from tests.lora_fixtures import create_adapter


def test_creation_depends_on_seed_and_name_alone(unet):
    """R-43: one seed, one adapter, whatever the ambient generator and the order of modules."""
    names = match_targets(unet, ["attention"])
    first = create_adapter(unet, names, 4, 4, seed=3)
    torch.manual_seed(99)
    again = create_adapter(unet, list(reversed(names)), 4, 4, seed=3)
    other = create_adapter(unet, names, 4, 4, seed=4)
    assert len(names) == 32
    for name in names:
        assert torch.equal(first.modules[name].down, again.modules[name].down)
        assert not torch.equal(first.modules[name].down, other.modules[name].down)
        assert not first.modules[name].up.any()
    downs = [first.modules[name].down.flatten()[:8] for name in names]
    assert not torch.equal(downs[0], downs[1])


def test_creation_leaves_the_ambient_generator_alone(unet):
    """R-04: creating an adapter draws nothing from the global generator."""
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    create_adapter(unet, match_targets(unet, ["attention"]), 4, 4, seed=0)
    assert torch.equal(torch.randn(3), expected)


@pytest.mark.parametrize("rank", [4, 64])
def test_down_has_standard_deviation_one_over_rank(unet, rank):
    """R-33: the default initialisation."""
    adapter = create_adapter(unet, match_targets(unet, ["attention"]), rank, rank, seed=0)
    values = torch.cat([pair.down.flatten().detach() for pair in adapter.modules.values()])
    assert float(values.std()) == pytest.approx(1 / rank, rel=0.05)


def test_orthogonal_rows(unet):
    """R-33: rows as large as the default's, orthogonal to each other; above the number of inputs, columns."""
    for rank in (4, 40):
        names = match_targets(unet, ["all"])
        adapter = draw_adapter(
            unet, dict.fromkeys(names, rank), dict.fromkeys(names, 1.0), seed=0, init="orthogonal"
        )
        for name, pair in adapter.modules.items():
            down = pair.down.detach().flatten(1)
            gram = down @ down.T if rank <= down.shape[1] else down.T @ down
            expected = torch.eye(len(gram)) * max(down.shape) / rank**2
            torch.testing.assert_close(gram, expected, rtol=1e-4, atol=1e-5, msg=name)
            assert float(down.square().mean().sqrt()) == pytest.approx(1 / rank, rel=1e-4)
            assert not pair.up.any()


def test_kaiming_is_the_paper_s(unet):
    """R-33: torch's own initialisation of a linear layer of these inputs, whatever the rank."""
    for rank in (4, 64):
        names = match_targets(unet, ["attention"])
        adapter = draw_adapter(
            unet, dict.fromkeys(names, rank), dict.fromkeys(names, 1.0), seed=0, init="kaiming"
        )
        for name in names[:3]:
            down = adapter.modules[name].down.detach()
            layer = torch.nn.Linear(down.shape[1], 4096)
            assert float(down.abs().max()) <= down.shape[1] ** -0.5
            assert float(down.std()) == pytest.approx(float(layer.weight.detach().std()), rel=0.15)


def test_every_module_has_its_rank_and_scale(unet, run):
    """R-33: ranks and scales differ by module; the commonest scale is the adapter's own."""
    names = match_targets(unet, ["attention"])
    ranks = {name: (8, 4, 2)[number % 3] for number, name in enumerate(names)}
    scales = {name: 3.0 if "mid_block" in name else 0.5 for name in names}
    adapter = draw_adapter(unet, ranks, scales, seed=0)
    assert {name: pair.rank for name, pair in adapter.modules.items()} == ranks
    assert {name: adapter.scale_of(name) for name in names} == scales
    assert (adapter.rank, adapter.alpha) == (8, 4.0)
    assert len(adapter.scales) == 8
    mount(unet, [(adapter, 1.0)])
    assert torch.isfinite(run(unet)).all()


def test_first_steps_change_the_output_alike_for_all_ranks(make_unet, run):
    """R-33: the output change of the first AdamW steps is within a factor of 1.5 over ranks 4 to 256."""
    changes = {}
    for rank in (4, 8, 16, 64, 256):
        unet = make_unet()
        adapter = create_adapter(unet, match_targets(unet, ["attention"]), rank, rank, seed=0)
        mount(unet, [(adapter, 1.0)])
        base = run(unet).detach()
        target = torch.randn(base.shape, generator=torch.Generator().manual_seed(2))
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-4)
        for _ in range(3):
            optimizer.zero_grad()
            (run(unet) - target).square().mean().backward()
            optimizer.step()
        changes[rank] = float((run(unet).detach() - base).norm())
    assert min(changes.values()) > 0
    assert max(changes.values()) / min(changes.values()) < 1.5, changes


def test_a_copy_shares_nothing(unet, make_adapter):
    """R-06: a copy needs no gradient, and leaves the original as it was."""
    adapter = make_adapter(unet)
    copy = adapter.to(dtype=torch.float16)
    assert (adapter.dtype, copy.dtype) == (torch.float32, torch.float16)
    assert not any(tensor.requires_grad for tensor in copy.parameters())
    copy = adapter.to()
    copy.parameters()[0].zero_()
    assert adapter.parameters()[0].any()
    assert copy.num_parameters == adapter.num_parameters == sum(t.numel() for t in adapter.parameters())
    assert copy.scale == adapter.scale == 0.5


def test_norm_and_difference_without_the_product():
    """R-36: the norms that measure rounding are those of the products; zero for equal pairs."""
    generator = torch.Generator().manual_seed(0)
    one = LowRank(torch.randn(3, 7, generator=generator), torch.randn(5, 3, generator=generator))
    two = LowRank(torch.randn(2, 7, generator=generator), torch.randn(5, 2, generator=generator))
    exact = (one.up @ one.down - two.up @ two.down).double().square().sum()
    assert one.distance_squared(two) == pytest.approx(float(exact), rel=1e-5)
    assert one.norm_squared() == pytest.approx(float((one.up @ one.down).square().sum()), rel=1e-5)
    assert one.distance_squared(one) == 0


def test_another_family_stops_and_another_base_warns(unet, make_adapter):
    """R-41: the family decides; another base of the family is a warning."""
    adapter = make_adapter(unet)
    adapter.notes |= {"sdlora.base_name": "some/base", "sdlora.base_digest": "abc"}
    with raises(AdapterError, "lora.family", shows=("style.safetensors", "sd1", "some/base", "sd2")):
        check_base(adapter, family="sd2", name="other", source="style.safetensors")
    warning = check_base(adapter, family="sd1", name="other", digest="def")
    assert warning is not None
    assert "some/base" in warning
    assert "\n" not in warning
    assert check_base(adapter, family="sd1", name="other", digest="abc") is None
    adapter.family = ""
    assert check_base(adapter, family="sd2", name="other") is None
